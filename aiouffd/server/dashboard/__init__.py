"""A page that shows what a server does, live (needs the extra `serve`).

Layout: `http` (who may look, and the answers) > `looks` (what is told) > page.html, page.css and page.js, which the
browser takes as they are.
"""
