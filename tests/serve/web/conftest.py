"""The browser that the monitor's page is tested with tests the chat page too."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "monitor" / "web"))


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    from fake_chat_server import fake_chat_server

    with fake_chat_server() as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from page_browser import chromium

    with chromium() as running:
        yield running


@pytest.fixture
def window(browser: Any, server: Any) -> Iterator[Any]:
    """A fresh profile before the fake server, which forgets what an earlier test set."""
    from page_browser import watched

    server.state.__init__()
    with watched(browser) as opened:
        yield opened
