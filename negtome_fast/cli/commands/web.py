"""`negtome-fast web`: a page in the browser that draws with and without guidance."""

from __future__ import annotations

import argparse
from typing import Any

from ..options import add_loading


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "web",
        help="a page in the browser: images without and with guidance",
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("--model", help="folder or Hub id; default: the embedded tiny-flux-avatars")
    add("--host", help="address to listen at; default 127.0.0.1, this machine alone")
    add("--port", type=int, help="default 7860; 0: a free one")
    add(
        "--allow-host",
        action="append",
        dest="allow_hosts",
        metavar="NAME",
        help="a name under which the page may be asked for, such as that of a proxy; may be "
        "repeated; always allowed: localhost, and with --host all addresses in figures",
    )
    add_loading(parser)


def run(options: argparse.Namespace) -> int:
    from ...generation import Settings
    from ..web import page

    values = {name: value for name, value in vars(options).items() if name != "command"}
    place = {name: values.pop(name) for name in ("host", "port", "allow_hosts") if name in values}
    page.serve(Settings(**values), **place)
    return 0
