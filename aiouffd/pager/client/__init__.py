"""The side of whoever uses a pager.

Layout: `client` (starts the pager, asks it, and replaces it when it dies), `tenant` (what a pager is given to serve),
`request` (what was asked for and is not answered yet), `orphan` (workers whose keeper has died).
"""
