"""Async verification tokens: password reset, e-mail confirmation, codes, magic links, invitations."""
