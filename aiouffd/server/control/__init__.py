"""The control of a server: HTTP and JSON on a Unix socket (needs the extra `serve`).

Layout: `api` (the socket, and its answers) > `openapi` (the document), `problems` (why something is refused) >
`actions` (what can be asked for) > `restoring` (sessions of the server before this one) > `values` (what comes and
goes).
"""
