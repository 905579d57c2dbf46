"""What people do, in a real browser, on each store."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page, expect
from vtoken import TokenManager

from password_reset.accounts import Change
from password_reset.accounts_mongodb import MongoChange
from password_reset.accounts_sql import SqlChange
from tests.conftest import ADA, OLD, NewPage
from tests.site import SECONDS, Site, code_in, link_in

NEW, OTHER = "the new long password", "another long password"
GRACE = "grace@example.org"

Picture = Callable[[Page, str], None]


def change_of(site: Site) -> type[MongoChange] | type[SqlChange]:
    """The class whose methods change accounts on this site's store."""
    return MongoChange if site.config.tokens_url.startswith("mongodb") else SqlChange


def expect_title(page: Page, title: str) -> None:
    expect(page.get_by_role("heading")).to_have_text(title)


def expect_problem(page: Page, problem: str) -> None:
    expect(page.get_by_role("alert")).to_have_text(problem)


def ask(page: Page, site: Site, email: str = ADA) -> None:
    page.goto(f"{site.url}/forgot")
    page.get_by_label("E-mail address").fill(email)
    page.get_by_role("button").click()
    expect_title(page, "Look into your mailbox")


def type_code(page: Page, code: str, password: str = NEW) -> None:
    page.get_by_label("Code").fill(code)
    page.get_by_label("New password").fill(password)
    page.get_by_role("button", name="Set password").click()


def a_wrong_code(right: str, number: int = 0) -> str:
    return f"{(int(right.replace(' ', '')) + 1 + number) % 10**6:06}"


def set_password(page: Page, password: str = NEW) -> None:
    page.get_by_label("New password").fill(password)
    page.get_by_role("button").click()


def sign_in(page: Page, site: Site, password: str, email: str = ADA) -> None:
    page.goto(site.url)
    page.get_by_label("E-mail address").fill(email)
    page.get_by_label("Password").fill(password)
    page.get_by_role("button").click()


def can_sign_in(page: Page, site: Site, password: str) -> bool:
    """Whether ada can; she is signed out afterwards."""
    sign_in(page, site, password)
    title = page.get_by_role("heading").and_(page.locator("h1"))
    expect(title.or_(page.get_by_role("alert")).first).to_be_visible()
    page.wait_for_load_state()
    if page.get_by_role("alert").count():
        return False
    expect_title(page, "Welcome")
    page.get_by_role("button", name="Sign out").click()
    expect_title(page, "Sign in")
    return True


def test_a_new_password_by_link(page: Page, new_page: NewPage, site: Site, take_picture: Picture) -> None:
    signed_in_before = new_page()
    sign_in(signed_in_before, site, OLD)
    expect_title(signed_in_before, "Welcome")

    page.goto(site.url)
    page.get_by_role("link", name="Forgot your password?").click()
    expect_title(page, "Forgot your password?")
    take_picture(page, "forgot")
    page.get_by_label("E-mail address").fill("  Ada@Example.org ")
    page.get_by_role("button").click()
    expect_title(page, "Look into your mailbox")
    take_picture(page, "sent")

    page.goto(site.next_link(ADA))
    expect_title(page, "Set a new password")
    take_picture(page, "link")
    set_password(page)
    expect_title(page, "Your password is changed")
    take_picture(page, "changed")
    assert "was changed" in site.next_mail(ADA)

    assert not can_sign_in(page, site, OLD)
    assert can_sign_in(page, site, NEW)
    signed_in_before.reload()
    expect_title(signed_in_before, "Sign in")  # a reset ends the sessions


def test_a_refused_password_leaves_the_link_good(page: Page, site: Site) -> None:
    ask(page, site)
    page.goto(site.next_link(ADA))
    page.get_by_label("New password").evaluate("field => { field.minLength = 0 }")
    set_password(page, "too short")
    expect_problem(page, "Please take a password of at least 15 characters.")
    set_password(page)
    expect_title(page, "Your password is changed")


def test_a_link_opened_twice(page: Page, new_page: NewPage, site: Site, take_picture: Picture) -> None:
    ask(page, site)
    link = site.next_link(ADA)
    second = new_page()
    for each in (page, second):
        each.goto(link)
        expect_title(each, "Set a new password")
    set_password(page)
    expect_title(page, "Your password is changed")
    set_password(second, OTHER)
    expect_title(second, "This link is over")
    take_picture(second, "over")
    page.goto(link)
    expect_title(page, "Your password is changed already")  # the browser that did it
    assert can_sign_in(page, site, NEW)
    second.goto(f"{site.url}/reset?key=reset_nobody-has-this-one")
    expect_title(second, "This link is not valid")


def test_another_link_goes_to_the_owner_of_one_that_is_over(page: Page, site: Site) -> None:
    ask(page, site)
    link = site.next_link(ADA)
    site.clock.advance(hours=2)
    page.goto(link)
    expect_title(page, "This link is over")
    page.get_by_role("button", name="Send another").click()
    expect_title(page, "Look into your mailbox")
    page.goto(site.next_link(ADA))
    set_password(page)
    expect_title(page, "Your password is changed")


def test_a_form_that_is_sent_twice_shows_success_twice(page: Page, site: Site) -> None:
    ask(page, site)
    link = site.next_link(ADA)
    page.goto(link)
    page.get_by_label("New password").fill(NEW)
    form = page.locator("form").evaluate("form => new URLSearchParams(new FormData(form)).toString()")
    cookies = {each["name"]: each["value"] for each in page.context.cookies() if "name" in each}
    with httpx.Client(base_url=site.url, cookies=cookies, trust_env=False) as client:
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        answers = [client.post("/reset", content=form, headers=headers) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert "is changed already" in answers[1].text


def test_a_scanner_opens_the_link_first(page: Page, site: Site) -> None:
    ask(page, site)
    link = site.next_link(ADA)
    with httpx.Client(follow_redirects=True, trust_env=False) as scanner:
        for _ in range(5):
            assert scanner.get(link).status_code == 200
        scanner.head(link)
        scanner.post(link)  # without the form's fields
    page.goto(link)
    set_password(page)
    expect_title(page, "Your password is changed")


@pytest.mark.parametrize("late", [False, True])
def test_a_link_is_good_for_an_hour(page: Page, new_page: NewPage, site: Site, late: bool) -> None:
    ask(page, site)
    link = site.next_link(ADA)
    opened = new_page()
    opened.goto(link)
    expect_title(opened, "Set a new password")
    site.clock.advance(hours=1, milliseconds=1 if late else 0)
    page.goto(link)
    expect_title(page, "This link is over" if late else "Set a new password")
    set_password(opened)
    expect_title(opened, "This link is over" if late else "Your password is changed")
    assert can_sign_in(page, site, OLD if late else NEW)


def test_resending_waits_a_minute_and_ends_the_older_message(
    page: Page, site: Site, take_picture: Picture
) -> None:
    ask(page, site)
    first = site.next_mail(ADA)
    again = page.get_by_role("button", name="Send it again")
    expect(again).to_be_disabled()
    expect(page.get_by_text("in 1:00")).to_be_visible()
    take_picture(page, "code")
    ask(page, site)  # within the minute: the same page, and no message
    page.goto(link_in(first))
    expect_title(page, "Set a new password")

    site.clock.advance(seconds=19)
    ask(page, site)
    expect(page.get_by_text("in 0:41")).to_be_visible()
    site.clock.advance(seconds=41)
    ask(page, site)
    second = site.next_link(ADA)
    page.goto(link_in(first))
    expect_title(page, "This link is over")
    page.goto(second)
    expect_title(page, "Set a new password")
    assert site.mails.empty()


def test_an_answer_does_not_tell_who_has_an_account(page: Page, new_page: NewPage, site: Site) -> None:
    stranger = new_page()
    ask(stranger, site, GRACE)
    ask(page, site, ADA)
    assert _shown(stranger).replace(GRACE, ADA) == _shown(page)
    right = site.next_code(ADA)
    for number in range(7):
        for each in (stranger, page):
            type_code(each, a_wrong_code(right, number))
            expect_problem(
                each, "That code is not valid." if number < 5 else "Too many codes. Wait 15 minutes."
            )
        assert _shown(stranger).replace(GRACE, ADA) == _shown(page)
    for each, email in ((stranger, GRACE), (page, ADA)):
        ask(each, site, email)
    assert _shown(stranger).replace(GRACE, ADA) == _shown(page)
    sign_in(page, site, "a wrong long password")
    sign_in(stranger, site, "a wrong long password", GRACE)
    assert _shown(stranger) == _shown(page)
    assert site.mails.empty()


def _shown(page: Page) -> str:
    page.wait_for_load_state()
    return page.locator("main").inner_text()


def test_a_new_password_by_code(page: Page, site: Site) -> None:
    ask(page, site)
    mail = site.next_mail(ADA)
    type_code(page, a_wrong_code(code_in(mail)))
    expect_problem(page, "That code is not valid.")
    expect(page.get_by_text("4 attempts left")).to_be_visible()
    type_code(page, "12")  # a slip of the finger costs nothing
    expect_problem(page, "That code is not valid.")
    expect(page.get_by_text("4 attempts left")).to_be_visible()
    type_code(page, code_in(mail))
    expect_title(page, "Your password is changed")
    assert "was changed" in site.next_mail(ADA)
    assert can_sign_in(page, site, NEW)
    page.goto(link_in(mail))
    expect_title(page, "Your password is changed already")  # one message, one use


def test_wrong_codes_are_capped_and_leave_the_link(page: Page, site: Site, take_picture: Picture) -> None:
    ask(page, site)
    mail = site.next_mail(ADA)
    for number in range(5):
        type_code(page, a_wrong_code(code_in(mail), number))
        expect_problem(page, "That code is not valid.")
    type_code(page, code_in(mail))
    expect_problem(page, "Too many codes. Wait 15 minutes.")
    take_picture(page, "capped")
    site.clock.advance(minutes=2)
    ask(page, site)
    mail = site.next_mail(ADA)
    type_code(page, code_in(mail))  # a new code brings no new attempts
    expect_problem(page, "Too many codes. Wait 13 minutes.")
    page.goto(link_in(mail))
    set_password(page)
    expect_title(page, "Your password is changed")


def test_a_code_is_good_for_ten_minutes(page: Page, site: Site) -> None:
    ask(page, site)
    mail = site.next_mail(ADA)
    site.clock.advance(minutes=10, milliseconds=1)
    type_code(page, code_in(mail))
    expect_problem(page, "That code is not valid.")
    page.goto(link_in(mail))
    expect_title(page, "Set a new password")


def test_a_second_browser_comes_while_the_first_sets_its_password(
    page: Page, new_page: NewPage, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, may_go_on = threading.Event(), threading.Event()
    whole: Any = change_of(site).set_password

    async def slow(accounts: Change, email: str, password: str) -> None:
        entered.set()
        await asyncio.to_thread(may_go_on.wait, SECONDS)
        await whole(accounts, email, password)

    monkeypatch.setattr(change_of(site), "set_password", slow)
    ask(page, site)
    link = site.next_link(ADA)
    second = new_page()
    for each, password in ((page, NEW), (second, OTHER)):
        each.goto(link)
        each.get_by_label("New password").fill(password)
    page.evaluate("setTimeout(() => document.forms[0].submit())")
    assert entered.wait(SECONDS)
    second.get_by_role("button").click()
    expect_problem(second, "This link is being used. Try again in a minute.")
    may_go_on.set()
    expect_title(page, "Your password is changed")
    assert can_sign_in(page, site, NEW)


@pytest.mark.parametrize("fails", ["before the use is marked", "after it"])
def test_a_transaction_that_fails_leaves_the_old_password_and_the_link_good(
    page: Page, site: Site, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    async def broken(*_: object) -> None:
        raise OSError("no space left on device")

    ask(page, site)
    link = site.next_link(ADA)
    page.goto(link)
    with monkeypatch.context() as patch:
        if fails == "after it":
            patch.setattr(TokenManager, "deactivate", broken)
        else:
            patch.setattr(change_of(site), "set_password", broken)
        set_password(page)
        expect(page.locator("body")).to_have_text("Internal Server Error")
    assert can_sign_in(page, site, OLD)
    page.goto(link)
    set_password(page)
    expect_title(page, "Your password is changed")


def test_several_browsers_race(new_page: NewPage, site: Site) -> None:
    pages = [new_page() for _ in range(4)]
    ask(pages[0], site)
    link = site.next_link(ADA)
    passwords = [f"the password of number {number}" for number in range(len(pages))]
    for page, password in zip(pages, passwords, strict=True):
        page.goto(link)
        page.get_by_label("New password").fill(password)
    for page in pages:  # each submits by itself, so they overlap
        page.evaluate("setTimeout(() => document.forms[0].submit(), 200)")
    for page in pages:
        page.get_by_role("heading", name="changed").or_(
            page.get_by_role("heading", name="This link is over")
        ).or_(page.get_by_role("alert")).first.wait_for()
    titles = [page.get_by_role("heading").inner_text() for page in pages]
    assert set(titles) <= {"This link is over", "That did not work", "Your password is changed"}
    assert titles.count("Your password is changed") == 1
    winner = titles.index("Your password is changed")
    assert [can_sign_in(pages[0], site, password) for password in passwords] == [
        number == winner for number in range(len(pages))
    ]


def test_an_invitation_is_for_three(page: Page, new_page: NewPage, site: Site, take_picture: Picture) -> None:
    sign_in(page, site, OLD)
    page.get_by_role("button", name="Invite three people").click()
    expect_title(page, "Your invitation")
    take_picture(page, "invitation")
    link = page.locator("output").inner_text()

    def join(email: str) -> Page:
        newcomer = new_page()
        newcomer.goto(link)
        if newcomer.get_by_role("button").count():
            newcomer.get_by_label("E-mail address").fill(email)
            set_password(newcomer)
        return newcomer

    expect_problem(join(ADA), "That address has an account already.")  # which uses nothing up
    for number in range(3):
        expect_title(join(f"friend-{number}@example.org"), "You have joined")
    expect_title(join("one-too-many@example.org"), "This link is not valid")
    sign_in(page := new_page(), site, NEW, "friend-2@example.org")
    expect_title(page, "Welcome")


def test_a_newer_invitation_ends_the_older(page: Page, site: Site) -> None:
    first, second = (site.invitation() for _ in range(2))
    page.goto(first)
    expect_title(page, "This link is not valid")
    page.goto(second)
    expect_title(page, "You are invited")


def test_a_form_of_another_site_is_refused(page: Page, new_page: NewPage, site: Site) -> None:
    stranger = new_page()
    stranger.goto(f"{site.url}/forgot")
    theirs = stranger.locator("input[name=csrf]").input_value()
    page.goto(f"{site.url}/forgot")
    page.locator("input[name=csrf]").evaluate("(field, value) => { field.value = value }", theirs)
    page.get_by_label("E-mail address").fill(ADA)
    page.get_by_role("button").click()
    expect_title(page, "That did not work")
    assert site.mails.empty()


def test_no_page_passes_its_address_on(page: Page, site: Site) -> None:
    seen: list[str] = []
    page.on("request", lambda request: seen.append(request.headers.get("referer", "")))
    ask(page, site)
    answer = page.goto(site.next_link(ADA))
    assert answer is not None
    headers = answer.all_headers()
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] == "no-store"
    set_password(page)
    expect_title(page, "Your password is changed")
    page.get_by_role("link").click()
    expect_title(page, "Sign in")
    assert len(seen) >= 8
    assert set(seen) == {""}


def test_links_are_built_from_the_configuration(site: Site) -> None:
    with httpx.Client(base_url=site.url, headers={"Host": "evil.example"}, trust_env=False) as client:
        form = client.get("/forgot").text
        csrf = form.partition('name="csrf" value="')[2].partition('"')[0]
        assert client.post("/forgot", data={"csrf": csrf, "email": ADA}).status_code == 200
    assert site.next_link(ADA).startswith(f"{site.url}/reset?key=")
