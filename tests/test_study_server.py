"""The server as a process: blinding, refusals, and that no acknowledged vote is ever lost."""

from __future__ import annotations

import json
import re
import signal
import sqlite3
import threading
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import pytest
from studies import METHODS, ask, links, make_study, proxied, serving

from lora_dae.study.store import StudyStore

for package in ("fastapi", "uvicorn"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install 'lora-dae[study]'")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_study(tmp_path_factory.mktemp("served"), raters=8)


@pytest.fixture(scope="module")
def address(study: Path) -> Iterator[str]:
    with serving(study) as (address, _):
        yield address


def test_a_rater_goes_from_consent_to_thanks_and_never_learns_a_method(address: str, study: Path) -> None:
    token = links(study)[1]
    api = f"{address}/api/{token}"
    status, page, headers = ask(f"{address}/r/{token}")
    assert status == 200 and b"<main" in page and "default-src 'none'" in headers["content-security-policy"]
    assert headers["referrer-policy"] == "no-referrer" and "set-cookie" not in headers
    _, state, _ = ask(f"{api}/next")
    assert state["state"] == "consent"
    trial = {"trial": 1, "answer": "left", "ms": 900}
    assert ask(f"{api}/vote", trial)[0] == 403  # not before consent
    seen = [json.dumps(state)]
    _, state, _ = ask(f"{api}/consent", {"language": "zh"})
    total, numbers = state["total"], []
    while state["state"] == "trial":
        numbers.append(state["number"])
        seen.append(json.dumps(state))
        answer = "3" if state["kind"] == "opinion" else "tie"
        for side in ("left", "right", "reference"):
            if state[side]:
                assert ask(urljoin(f"{address}/r/{token}", state[side]))[1][:4] == b"\x89PNG"
        assert (state["reference"] is not None) == (state["question"] == "truth")
        _, state, _ = ask(f"{api}/vote", {"trial": state["trial"], "answer": answer, "ms": 900})
    done = {"state": "done", "title": "Fashion pictures", "language": "zh"}
    assert numbers == list(range(1, total + 1)) and state == done
    text = " ".join(seen) + page.decode()
    assert not any(word in text for word in (*METHODS, "check", "repeat", "degraded", "clear"))
    assert ask(f"{api}/next")[1] == done


def test_a_reload_goes_on_and_the_first_vote_stands(address: str, study: Path) -> None:
    api = f"{address}/api/{links(study)[2]}"
    _, first, _ = ask(f"{api}/consent", {"language": "en"})
    answer = "1" if first["kind"] == "opinion" else "left"
    _, second, _ = ask(f"{api}/vote", {"trial": first["trial"], "answer": answer, "ms": 5})
    other = "5" if first["kind"] == "opinion" else "right"
    _, again, _ = ask(f"{api}/vote", {"trial": first["trial"], "answer": other, "ms": 5})  # e.g. a second tab
    assert second == again == ask(f"{api}/next")[1] and second["number"] == 2
    assert ask(f"{api}/consent", {"language": "zh"})[1] == {**second, "language": "zh"}  # chosen anew, on the way
    store = StudyStore(study)
    kept = store.rows("SELECT answer FROM votes WHERE trial=?", (first["trial"],))
    store.close()
    assert kept == [(answer,)]


def test_foreign_pages_and_nonsense_are_refused(address: str, study: Path) -> None:
    tokens = links(study)
    api = f"{address}/api/{tokens[3]}"
    _, state, _ = ask(f"{api}/consent", {"language": "en"})
    vote = {"trial": state["trial"], "answer": "left", "ms": 5}
    _, foreign, _ = ask(f"{address}/api/{tokens[4]}/consent", {"language": "en"})
    cases: list[tuple[Any, dict[str, str], int]] = [
        (vote, {"X-Study": ""}, 403),  # what a form of another page would send
        (vote, {"Content-Type": "text/plain"}, 403),
        (vote, {"Origin": "http://evil.example"}, 403),
        (b"{", {}, 400),
        (b"[]", {}, 400),
        (b'{"a": "' + b"x" * 5000 + b'"}', {}, 413),
        ({**vote, "answer": "best"}, {}, 400),
        ({**vote, "answer": 1}, {}, 400),
        ({**vote, "trial": "1"}, {}, 400),
        ({**vote, "trial": True}, {}, 400),
        ({**vote, "trial": 2**70}, {}, 400),
        ({**vote, "trial": foreign["trial"]}, {}, 400),  # another rater's
        ({"trial": state["trial"]}, {}, 400),
    ]
    for body, headers, expected in cases:
        status, answer, _ = ask(f"{api}/vote", body, headers)
        assert (status, set(answer)) == (expected, {"error"}), (body, headers)
    assert ask(f"{api}/next")[1]["trial"] == state["trial"]  # nothing was stored
    assert ask(f"{api}/consent", {"language": "xx"})[0] == 400
    assert (
        ask(f"{api}/vote", vote if state["kind"] == "pair" else {**vote, "answer": "3"}, {"Origin": address})[0] == 200
    )


def test_behind_a_proxy_that_hands_on_no_host_the_public_address_is_let_in(tmp_path: Path) -> None:
    """nginx's proxy_pass sends its own target as Host by default, while a browser names the address that it sees."""
    study = make_study(tmp_path, url="https://Study.example:443/rate/")
    with serving(study) as (address, process):
        consent = f"{address}/api/{links(study)[1]}/consent"
        for origin in ("https://evil.example", "http://study.example", "https://study.example.evil.example", "null"):
            status, answer, _ = ask(consent, {"language": "en"}, {"Origin": origin})
            assert status == 403 and "url=" in answer["error"] and "proxy_set_header Host" in answer["error"]
        status, state, _ = ask(consent, {"language": "en"}, {"Origin": "https://study.example"})
        assert status == 200 and state["state"] == "trial"
        handed_on = {"Origin": "https://other.example", "Host": "other.example"}  # as after proxy_set_header Host
        assert ask(consent, {"language": "en"}, handed_on)[0] == 200
    assert process.stdout is not None
    told = process.stdout.read()  # by whom it can be mended: once
    assert told.count("proxy_set_header Host") == 1 and "'https://evil.example'" in told


def test_a_study_under_a_path_loads_all_that_its_page_asks_for(address: str, study: Path) -> None:
    """``url=https://host/rate``: nothing of the page lies at the host's root."""
    token = links(study)[6]
    with proxied(address, "/rate") as public:
        page_url = f"{public}/r/{token}"
        _, page, headers = ask(page_url)
        assert "default-src 'none'" in headers["content-security-policy"]
        assets = re.findall(r'(?:href|src)="([^"]+\.(?:css|js))"', page.decode())
        assert len(assets) == 2
        texts = []
        for asset in assets:
            status, text, _ = ask(urljoin(page_url, asset))
            assert status == 200, asset
            texts.append(text.decode())
        (api,) = re.findall(r"fetch\(`([^$]+)\$", texts[assets.index(next(a for a in assets if a.endswith(".js")))])
        address_of_api = urljoin(page_url, api) + token
        _, state, _ = ask(f"{address_of_api}/consent", {"language": "en"}, {"Origin": public.removesuffix("/rate")})
        assert state["state"] == "trial"
        assert ask(urljoin(page_url, state["left"]))[1][:4] == b"\x89PNG"


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_server_that_is_stopped_leaves_all_votes_in_one_file(stop: signal.Signals, tmp_path: Path) -> None:
    """Who copies study.db alone, afterwards, has them."""
    study = make_study(tmp_path)
    with serving(study) as (address, process):
        api = f"{address}/api/{links(study)[1]}"
        _, state, _ = ask(f"{api}/consent", {"language": "en"})
        answer = "1" if state["kind"] == "opinion" else "left"
        assert ask(f"{api}/vote", {"trial": state["trial"], "answer": answer, "ms": 5})[0] == 200
        assert (study / "study.db-wal").exists()
        process.send_signal(stop)
        assert process.wait(60) == 0
    assert not (study / "study.db-wal").exists()
    copy = tmp_path / "copy.db"
    copy.write_bytes((study / "study.db").read_bytes())
    db = sqlite3.connect(copy)
    assert db.execute("SELECT answer FROM votes").fetchall() == [(answer,)]
    db.close()


def test_pictures_are_served_by_name_only(address: str, study: Path) -> None:
    token = links(study)[5]
    name = next((study / "pictures").iterdir()).name
    status, data, headers = ask(f"{address}/picture/{token}/{name}")
    assert (
        status == 200 and data == (study / "pictures" / name).read_bytes() and "immutable" in headers["cache-control"]
    )
    again = ask(f"{address}/picture/{token}/{name}", headers={"If-None-Match": headers["etag"]})
    assert again[:2] == (304, b"")
    for path in ("../study.db", "..%2fstudy.db", "%2e%2e%2flinks.txt", "....//links.txt", name + "%00", "study.db"):
        assert ask(f"{address}/picture/{token}/{path}")[0] == 404, path
    for path in ("/docs", "/openapi.json", "/links.txt", "/admin", "/admin/", "/"):
        assert ask(address + path)[0] == 404, path


def test_admin_page_needs_its_token_and_guessing_is_slowed_down(study: Path) -> None:
    admin, rater = links(study)[:2]
    with serving(study) as (address, _):
        status, page, _ = ask(f"{address}/admin/{admin}")
        assert status == 200 and page.count(b"<tr>") == 9
        codes = [
            ask(f"{address}/{kind}/{token}")[0] for kind in ("r", "admin") for token in ("x" * 32, "a", rater[:-1])
        ]
        codes.append(ask(f"{address}/admin/{rater}")[0])
        assert codes == [404] * 7
        assert 429 in [ask(f"{address}/r/guess{k}")[0] for k in range(60)]
        assert ask(f"{address}/r/{rater}")[0] == 200  # who has a link is not slowed down


def test_every_acknowledged_vote_survives_kill_9(tmp_path: Path) -> None:
    study = make_study(tmp_path, prompts=30, raters=6, pairs=60, opinions=0)
    acknowledged: list[int] = []
    enough = threading.Event()

    def rater(address: str, token: str) -> None:
        try:
            _, state, _ = ask(f"{address}/api/{token}/consent", {"language": "en"})
            while state["state"] == "trial":
                voted = state["trial"]
                status, state, _ = ask(f"{address}/api/{token}/vote", {"trial": voted, "answer": "left", "ms": 5})
                assert status == 200
                acknowledged.append(voted)
                if len(acknowledged) >= 60:
                    enough.set()
        except (OSError, HTTPException):  # the server is gone
            pass

    with serving(study) as (address, process):
        threads = [threading.Thread(target=rater, args=(address, t)) for t in links(study)[1:]]
        for thread in threads:
            thread.start()
        assert enough.wait(120)
        process.kill()  # SIGKILL, in the middle of it
        for thread in threads:
            thread.join()
    db = sqlite3.connect(study / "study.db")
    stored = {row[0] for row in db.execute("SELECT trial FROM votes")}
    assert set(acknowledged) <= stored and 60 <= len(acknowledged) < 6 * 60
    assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    db.close()
    store = StudyStore(study)  # and the study goes on
    assert store.next_trial(0) is not None
    store.close()


def test_a_vote_that_cannot_be_written_is_not_acknowledged(tmp_path: Path) -> None:
    store = StudyStore(make_study(tmp_path))
    store.rows("DROP TABLE votes")
    with pytest.raises(sqlite3.Error):
        store.vote(1, "left", 5).result(timeout=20)
    store.close()
