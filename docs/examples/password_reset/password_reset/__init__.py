"""An example application: password reset by link and by code, and invitations, with FastAPI and vtoken."""
