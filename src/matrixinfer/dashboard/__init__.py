"""The dashboard of the admin listener: what the last hour brought, who is there, and why requests went where they did.

`history` and `round_robin` count as requests pass, `fleet` and `decisions` read the other parts when a page asks, `live`
says what has changed since a page last asked, and `pages` serves all of it with the files in `static/`.
"""
