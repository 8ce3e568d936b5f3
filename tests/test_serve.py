"""The server of a gallery: answers, refused requests, limits, and the end of the process."""

import asyncio
import contextlib
import errno
import io
import itertools
import json
import logging
import os
import re
import resource
import shlex
import shutil
import socket
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from msgspec.structs import replace

from tests.helpers import docs, made_galleries, servers
from tests.helpers.seen import contents, refused
from vidjax.apps import web
from vidjax.apps.gallery.answers import as_json
from vidjax.apps.gallery.gallery import Gallery
from vidjax.apps.gallery.store import JOURNAL_FILE, VectorOrigin
from vidjax.apps.serve import app as app_lib, batcher as batcher_lib, limits as limits_lib
from vidjax.apps.serve.batcher import Batcher, Changes, Question
from vidjax.apps.serve.limits import Refused, ServerMetrics
from vidjax.apps.server_limits import LIMITS, Limits
from vidjax.cli import program
from vidjax.data import clip_files
from vidjax.utils import errors, terminal

SMALL = Limits(
    body_bytes=1 << 20, json_bytes=1 << 18, held_bytes=4 << 20, clips=32, frames=1000,
    request_seconds=1, lock_seconds=0, connections=12, idle_seconds=1, drain_seconds=1,
)  # fmt: skip


class Inside(servers.Served):
    """A server that runs in a thread of this process while the context is open."""

    def __init__(self, gallery, limits=SMALL, token=None):
        self.app = app = app_lib.make_app(gallery, limits, token)
        self.listener = web.listen("127.0.0.1", 0, limits)
        self.port = self.listener.getsockname()[1]
        self.server = web.Server(app, limits, app.leaving)
        self.thread = threading.Thread(target=self.server.run, args=([self.listener],), daemon=True)

    def __enter__(self):
        self.thread.start()
        self.wait()
        return self

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive()


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    return servers.make_gallery(tmp_path_factory.mktemp("served") / "g")


@pytest.fixture
def folder(people, tmp_path):
    """A copy of the gallery, which a test may change."""
    return shutil.copytree(people.folder, tmp_path / "g")


@pytest.fixture(scope="module")
def inside(people):
    with Inside(people) as server:
        yield server


CLIPS = {f"query {n}": servers.make_frames(7000 + 10 * n, f"person {n}", 3) for n in range(6)}
NPZ = {"Content-Type": "application/x-npz"}


def as_npz(**arrays: Any):
    np.savez(content := io.BytesIO(), **arrays)
    return content.getvalue()


def question(clips):
    return Question({
        name: {key: {"features": x} for key, x in clip.items()} for name, clip in clips.items()
    })  # fmt: skip


def test_enrolment_lists_clips_of_another_person_and_of_another_enrolled_person(folder):
    """Of Zoë, a clip shows Eve. The clip of Ada is a copy of a clip of person 3."""
    names = dict.fromkeys(("Zoë 0", "Zoë 1", "Zoë 2", "Eve 7"), "Zoë") | {"copy": "Ada"}
    clips = servers.enrolment("Zoë", 0, 1, 2)["clips"] + servers.enrolment("Eve", 7)["clips"]
    clips += servers.as_json({"copy": servers.make_frames(30, "person 3")})
    with Inside(Gallery(folder)) as server:
        answer = server.ask("POST", "/enrol", {"clips": clips, "identities": names})[1]
        assert answer["enrolled"] == 5 and [*answer["misfits"]] == ["Eve 7"]
        assert answer["misfits"] == Gallery(folder).find_misfits("Zoë")
        assert answer["rivals"] == {"copy": "person 3"}
        described = server.ask("GET", "/openapi.json")[1]["components"]["schemas"]["Enrolment"]
        assert described["properties"].keys() == answer.keys() == {*described["required"]}
        more = servers.enrolment("Zoë", 3)  # only clips of the request are listed
        assert server.ask("POST", "/enrol", more)[1]["misfits"] == {}


def test_a_result_of_another_command_is_served_but_not_changed(people, tmp_path, caplog):
    folder = tmp_path / "names" / "gallery"
    Gallery.of_clips(folder, people.origin, people.backend, people.clips, "vidjax review names")
    before = contents(folder)
    with Inside(Gallery(folder)) as server:
        for method, path, body in (
            ("POST", "/enrol", servers.enrolment("Zoë", 0)), ("DELETE", "/clips/clip 30", None),
            ("DELETE", "/identities/person 3", None),
        ):  # fmt: skip
            status, answer = server.ask(method, path.replace(" ", "%20"), body)
            assert status == 409 and "to change names: vidjax review names" in answer["error"]
            described = server.ask("GET", "/openapi.json")[1]["paths"]
            route = re.sub("(identities|clips)/.*", r"\1/{name}", path)
            assert "409" in described[route][method.lower()]["responses"]
        assert server.ask("GET", "/identities")[1]["identities"]["person 3"] == 4
        assert server.ask("POST", "/identify", {"clips": servers.as_json(CLIPS)})[0] == 200
    assert contents(folder) == before and str(tmp_path) not in caplog.text


def assert_close(answer, expected):
    """Asserts that an answer in JSON equals `expected`, an `Answer`, to 1e-6."""
    assert answer["identity"] == expected.identity
    assert answer["score"] == pytest.approx(expected.score, abs=1e-6)
    for other, (name, probability) in zip(answer["best"], expected.best, strict=True):
        assert other == {"identity": name, "probability": pytest.approx(probability, abs=1e-6)}


def test_npz_and_json_requests_get_the_answers_of_python(inside, people, tmp_path):
    def ask(content, words="clip=q&"):
        return inside.ask("POST", f"/identify?{words}k=2&threshold=0.2", content, NPZ)

    wanted = people.identify(CLIPS, k=2, threshold=0.2)
    assert any(answer.identity for answer in wanted.values())

    def write(clips, nets):
        clip_files.write_npz(path := tmp_path / "x.npz", clips, nets)
        return path.read_bytes()

    # An .npz with several clips contains their names. The server checks the digests of the nets.
    many, other = write(CLIPS, people.origin.cards), write(CLIPS, {"face": "1" * 64})
    too_many = write({f"c {n}": CLIPS["query 0"] for n in range(33)}, {})
    body = {"clips": servers.as_json(CLIPS), "k": 2, "threshold": 0.2}
    in_json, in_npz = inside.ask("POST", "/identify", body)[1]["clips"], ask(many, "")[1]["clips"]
    assert [x["clip"] for x in in_json] == [x["clip"] for x in in_npz] == [*wanted]
    singly = [ask(as_npz(**clip))[1]["clips"][0] for clip in CLIPS.values()]
    for *answers, wanted_answer in zip(in_json, in_npz, singly, wanted.values(), strict=True):
        for answer in answers:
            assert_close(answer, wanted_answer)
    face = CLIPS["query 0"]["face"]
    for content, words, error in (
        (many, "clip=q&", "leave out ?clip"), (other, "", "not from the model of the gallery"),
        (too_many, "", "too many clips: send 1 to 32"), (as_npz(face=face), "", "add ?clip=NAME"),
        # Beyond float32, more than 1 MiB as float32, more than 1000 frames (see `SMALL`), a pickle.
        *((as_npz(face=wrong), "clip=q&", "") for wrong in (
            np.full((1, 8), 1e39), np.ones((1 << 15, 9), np.uint8), np.ones((1001, 8), np.uint8),
            np.array([{}], object),
        )),
    ):  # fmt: skip
        status, answer = ask(content, words)
        assert (status, error in answer["error"]) == (422, True), answer


def test_verify_gets_the_answers_of_python(tmp_path):
    clips = made_galleries.make_clips(strangers=99)
    people = made_galleries.make(tmp_path / "g", clips, origin=made_galleries.CARDS)
    wanted, rule = people.verify(CLIPS, "person 3"), people.match_rule("person 3")
    assert {match.accepted for match in wanted.values()} == {True, False}
    body = {"clips": servers.as_json(CLIPS), "identity": "person 3"}
    with Inside(people) as server:
        answer = server.ask("POST", "/verify", body)[1]
        assert answer["rule"] == json.loads(json.dumps(rule.to_dict()))
        assert answer["misfits"] == people.find_misfits("person 3")
        for found, (clip, match) in zip(answer["clips"], wanted.items(), strict=True):
            expected = {"clip": clip, "identity": "person 3", **match.to_dict()}
            for name in ("best", "worst", "log_ratio", "probability"):
                assert found.pop(name) == pytest.approx(expected.pop(name), abs=1e-6)
            assert found == expected
        for fields, status, words in (
            ({"identity": "person 33"}, 404, "no such name is enrolled"),
            ({"fmr": 0.001}, 422, "the lowest fmr is 0.01"), ({"fmr": 1}, 422, "fmr"),
            ({"threshold": 0.5}, 422, "choose from clips, identity, fmr"),
        ):  # fmt: skip
            found, answer = server.ask("POST", "/verify", {**body, **fields})
            assert (found, words in answer["error"]) == (status, True), answer


def test_questions_in_a_batch_get_their_own_answers_or_errors(people):
    too_narrow = question({"b": {"face": np.ones((1, 3), np.float32)}})
    batch: Any = [*(question({clip: frames}) for clip, frames in CLIPS.items()), too_narrow]
    *answers, error = batcher_lib.answer(people, batch)
    assert isinstance(error, errors.UserError) and "clip b" in str(error)
    for answer, (clip, wanted) in zip(answers, people.identify(CLIPS).items(), strict=True):
        assert_close(as_json(clip, answer[0]), wanted)


@pytest.mark.slow
def test_questions_after_warm_up_do_not_compile(nearest_run, data, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(batcher_lib, "PAD_LENGTHS", (1, 8))  # compiles less
    gallery = Gallery.create(tmp_path / "g", nearest_run, data)
    batcher_lib.warm(gallery)
    with jax.log_compiles():
        for lengths in ([1], [7, 1], [8] * 6):
            batcher_lib.answer_batch(
                gallery, [question(made_galleries.random_clips(gallery.run, *lengths))]
            )
    assert not [line for line in caplog.messages if "ompiling" in line]  # C or c


def test_server_answers_the_requests_of_the_page(tmp_path, monkeypatch):
    page = docs.SERVER.read_text()
    blocks = "".join(re.findall(r"```sh\n(.*?)```", page, re.S)).replace("\\\n", " ")
    requests = [x for x in blocks.splitlines() if x.startswith("curl ") and "localhost:8080" in x]
    assert len(requests) == 11
    # In the README, a face has 2 features, and fpir=0.01 needs 99 enrolled strangers.
    monkeypatch.setattr(made_galleries, "WIDTHS", {"face": 2})
    clips = {f"stranger {n}": made_galleries.make_clip(n, None) for n in range(99)}
    clips |= {name: made_galleries.make_clip(99, name) for name in ("Ada", "Bo")}
    origin = VectorOrigin("/models", "0" * 64, centred=True, cards={"face": "0" * 64})
    monkeypatch.chdir(tmp_path)
    np.savez("c1.npz", face=np.ones((3, 2), np.float32))
    Path("films").mkdir()
    clip_files.write_npz(Path("films/holiday.npz"), {"a": dict(np.load("c1.npz"))}, origin.cards)
    with Inside(made_galleries.make(tmp_path / "g", clips, origin=origin)) as server:
        for line in requests:
            curl = shlex.split(line, comments=True)
            given = dict(itertools.pairwise(curl))  # flag -> its value
            (path,) = (x.removeprefix("localhost:8080") for x in curl if x.startswith("localhost"))
            file, text = given.get("--data-binary"), given.get("-d")
            body = Path(file[1:]).read_bytes() if file else text and text.encode()
            headers = dict([given["-H"].split(": ")]) if "-H" in given else None
            method = given.get("-X", "POST" if body else "GET")
            assert server.ask(method, path, body, headers)[0] == 200, line


def test_people_are_enrolled_listed_and_never_named_after_removal(folder):
    """The slash in the name "Zoë / 2" must be quoted in paths. Unicode has two forms of the ë."""

    def query(name):
        """Returns the answer to a clip of a person, and whether the best list names the person."""
        clips = servers.as_json({"q": servers.make_frames(8100, name)})
        best = server.ask("POST", "/identify", {"clips": clips, "k": 50})[1]["clips"][0]
        return best["identity"], name in [other["identity"] for other in best["best"]]

    with Inside(Gallery(folder)) as server:
        body = servers.enrolment("Zoë / 2", 0, 1, 2)
        assert server.ask("POST", "/enrol", body)[1]["enrolled"] == 3
        assert Gallery(folder).identities["Zoë / 2"] == 3  # on the disk
        body["identity"] = "Zoe\u0308 / 2"  # the other form
        again = {"enrolled": 0, "unchanged": 3, "refused": []}
        again |= {key: {} for key in ("similar", "rivals", "misfits")}
        assert server.ask("POST", "/enrol", body)[1] == again
        assert query("Zoë / 2") == ("Zoë / 2", True)
        assert server.ask("DELETE", "/clips/Zo%C3%AB%20%2F%202%201")[1] == {"removed": 1}
        assert server.ask("GET", "/identities")[1]["identities"]["Zoë / 2"] == 2
        assert server.ask("DELETE", "/identities/Zoe%CC%88%20%2F%202")[1] == {"removed": 2}
        assert query("Zoë / 2") == (None, False)
        assert server.ask("DELETE", "/identities/Zo%C3%AB%20%2F%202")[0] == 404
        metrics = server.ask("GET", "/metrics")[1].decode()
        assert 'code="404",route="/identities/{name}"' in metrics
        # The time of probes is not mixed with the time of other requests.
        for route in ("/identify", "/v2/health/ready", "/identities/{name}"):
            assert re.search(f'vidjax_request_seconds_count{{route="{route}"}} [1-9]', metrics)
        assert "Zo" not in metrics
        # The server sees changes by another process.
        other = Gallery(folder)
        other.enrol({"y": servers.make_frames(8200, "Yan")}, "Yan")
        assert query("Yan")[1]
        other.remove(identity="Yan")
        assert not query("Yan")[1]
        # The gallery already has 6 strangers, see `made_galleries.make_clips`.
        strangers = {f"s {n}": servers.make_frames(9000 + n, f"s {n}") for n in range(20)}
        server.ask("POST", "/enrol", {"clips": servers.as_json(strangers), "strangers": True})
        rule = server.ask("GET", "/threshold?fpir=0.1")[1]
        assert rule["strangers"]["num_strangers"] == 6 + 20
        assert rule["probability"] == pytest.approx(np.exp(rule["strangers"]["score"]))
        rule = server.ask("GET", "/threshold")[1]  # too few strangers for the default rate of 1 %
        assert (rule["by"], rule["probability"]) == ("new", pytest.approx(0.5))


def test_gallery_errors_are_logged_without_leaking_to_clients(tmp_path, folder, caplog):
    people, path = Gallery(folder), folder / "gallery.sqlite"
    body = servers.enrolment("Secret", 0)
    query = ("POST", "/identify", {"clips": body["clips"]})
    with Inside(people) as server:

        def ask(wanted_status, *request):
            status, answer = server.ask(*request)
            assert status == wanted_status and str(tmp_path) not in str(answer)
            return answer.get("error")

        with people._store.open(write=True):
            assert "another process" in ask(503, "DELETE", "/clips/x")
        # A gallery file with two names (hard links) is read but not changed.
        os.link(path, tmp_path / "other name")
        assert "cannot be changed" in ask(503, "POST", "/enrol", body)
        assert str(folder) in caplog.text
        ask(200, *query)
        (tmp_path / "other name").unlink()
        people.remove(identity=list(people.identities))
        ask(409, *query)  # nobody is enrolled
        content = path.read_bytes()
        # A damaged gallery, whose error must not contain its names.
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.execute("UPDATE clip SET words = replace(words, 'stranger 1', 'Secret\n')")
            connection.execute("UPDATE gallery SET sha256 = x'00'")
            connection.commit()
        ask(503, *query)
        assert "is damaged" in caplog.text and "Secret" not in caplog.text
        path.write_bytes(content)
        for cause in (lambda: os.truncate(path, 100), path.unlink):
            assert server.is_ready()  # the gallery of the last turn is repaired
            cause()
            ask(503, "GET", "/identities")
            assert "cannot be read" in ask(503, "GET", "/v2/health/ready")
            ask(200, "GET", web.LIVE)
            path.write_bytes(content)
        ask(200, "GET", "/identities")
        denied = PermissionError(errno.EACCES, "Permission denied", str(path))
        assert limits_lib.to_refusal(denied, "").status == 503  # 507 is a full disk


def test_wrong_requests_get_a_one_line_error(inside, monkeypatch):
    def one_clip(**fields):
        return {"clips": [{"clip": "a", "face": [[0.5] * 8], **fields}]}

    other = "nobody is enrolled"  # a name that contains words of an error with another status
    too_long = b" " * (1 << 19)  # SMALL.json_bytes is 1 << 18
    npz = as_npz(face=np.full((1, 8), 0.5, np.float32)).translate(None, b"\0\r\n")  # as of curl -d
    plain = {"Content-Type": "text/plain"}
    rows = [(body, words, 413 if body is too_long else 422) for body, words in (
        (one_clip(face=[[0.5] * 7]), "clip 'a', face: features are 7 wide, but must be 8"),
        (one_clip(clip=other, face_quality=[1.0, 2.0]), f"clip {other}, face"),
        (one_clip(face=[["0.5"] * 8]), "str"),
        (one_clip(face=[[0.5] * 8] * 1001), "face: there are 1,001 frames: send at most 1,000"),
        (one_clip(face=[[1e300] * 8]), "finite"),
        ({"clips": [{"clip": "a", "nose": [[0.5] * 8]}]}, "nose"),
        ({**one_clip(), "fpir": 0.5, "threshold": 0.5}, "give one of them"),
        ({"clips": one_clip()["clips"] * 2}, "occurs twice"),
        ({"clips": one_clip()["clips"] * 33}, "32"),
        (b'{"clips": [{"clip": "a", "face": [[NaN]]}]}', "NaN and Infinity are not allowed"),
        ({**one_clip(), "threshhold": 0.5}, "choose from fpir, threshold, clips, k"),
        (b'{"clips":' + b"[" * 5000 + b"]" * 5000 + b"}", ""),  # nested too deeply
        (too_long, "bytes"),
    )]  # fmt: skip
    for body, words, status, path, headers in (
        *((*row, "identify", None) for row in rows),
        (one_clip(), "in the body", 422, "identify?k=1", None),  # it would be ignored
        (npz, "--data-binary", 422, "identify?clip=a", NPZ), (b"{}", "", 415, "identify", plain),
        ({**one_clip(), "identities": {}}, "send either identity,", 422, "enrol", None),
        (b"", "", 404, "none", None),
    ):  # fmt: skip
        found, content = inside.ask("POST", f"/{path}", body, headers)
        assert (found, words in content["error"]) == (status, True), (body, content)
        assert "\n" not in content["error"]
    assert inside.ask("PUT", "/identify")[0] == 405
    # A search for similar names would lock the gallery for minutes if names are long.
    monkeypatch.setattr(errors.difflib, "get_close_matches", None)  # a call would fail
    for path in ("/identities/persn%203", "/clips/clp%2030", "/clips/cannot%20be%20changed"):
        assert inside.ask("DELETE", path) == (404, {"error": "no such name is enrolled"})


def test_requests_from_other_sites_are_refused(inside):
    ours = f"127.0.0.1:{inside.port}"
    evil = ("http://evil.example", f"http://evil//{ours}", "http://127.0.0.1:1", "null", "http://[")
    for header, allowed, refused_values in (
        ("Host", (ours,), ("evil.example",)), ("Origin", (f"http://{ours}",), evil),
        ("Sec-Fetch-Site", ("same-origin", "none"), ("cross-site", "same-site")),
    ):  # fmt: skip
        for value in (*allowed, *refused_values):
            status = inside.ask("GET", "/identities", headers={header: value})[0]
            assert status == (200 if value in allowed else 403), value


def test_requests_need_the_token_of_a_long_and_private_file(people, tmp_path, say, monkeypatch):
    path = tmp_path / "my token"
    monkeypatch.setenv("HOME", str(tmp_path))  # a shell leaves the `~` in `--flag=~/token`
    assert str(path) in say("serve", "--gallery=x", "--token-file=~/my token", code=2)
    # A server that other machines can reach needs a token.
    assert "--token-file" in say("serve", f"--gallery={people.folder}", "--host=0.0.0.0", code=2)
    for text, mode, remedy in (  # the first remedy contains: openssl rand -hex 32 > PATH
        ("short\n", 0o600, f"32 > '{path}'"), ("a" * 40, 0o644, f"chmod 600 '{path}'"),
    ):  # fmt: skip
        path.write_text(text)
        path.chmod(mode)
        refused(lambda: limits_lib.read_token(path), remedy)
    # Its group may read a file of another user: Kubernetes mounts a link to a file of root.
    path.chmod(0o440)
    refused(lambda: limits_lib.read_token(path), "defaultMode: 0400")  # the user owns the file
    (link := tmp_path / "link").symlink_to(path)
    monkeypatch.setattr(limits_lib.os, "geteuid", lambda: path.stat().st_uid + 1)
    with Inside(people, token=limits_lib.read_token(link)) as server:
        # With a token, the server accepts any host.
        for sent, status in (
            ("Bearer " + "a" * 40, 200), ("bearer  " + "a" * 40, 200),  # upper or lower case
            ("Bearer " + "b" * 40, 401), ("ä", 401), (None, 401), ("Bearer", 401), ("Bearer ", 401),
            ("Bearer " + "a" * 39, 401), ("Bearer " + "a" * 41, 401), ("Bearer a", 401),
            ("Basic " + "a" * 40, 401), ("a" * 40, 401),
        ):  # fmt: skip
            headers = {"Host": "people.example"} | ({"Authorization": sent} if sent else {})
            assert server.ask("GET", "/identities", headers=headers)[0] == status


def test_wrong_addresses_and_a_folder_instead_of_a_gallery_get_a_remedy(inside):
    refused(lambda: web.listen("127.0.0.1", inside.port), "in use", "--port")
    refused(lambda: web.listen(64 * "a", 0), "--host")  # longer than a part of a name may be
    folder: Any = "people"
    refused(lambda: app_lib.make_app(folder), "vidjax.Gallery(FOLDER)")


def talk(port, content):
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(content)
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def test_access_log_has_ids_counts_and_routes_but_no_names(folder, caplog):
    caplog.set_level(logging.INFO, limits_lib.ACCESS.name)
    secret, path = "s" * 40, folder / "gallery.sqlite"
    head = f"Authorization: Bearer {secret}\r\nConnection: close\r\n"
    body = json.dumps(servers.enrolment("Secret", 0, 1)).encode()
    post = f"POST /enrol HTTP/1.1\r\nHost: a\r\n{head}Content-Type: application/json\r\n"
    post += f"Content-Length: {len(body)}\r\n"
    ids = []
    with Inside(Gallery(folder), token=secret.encode()) as server:
        for start, given in (
            (post, "my-id_1.x"), (f"DELETE /clips/Secret%200 HTTP/1.1\r\nHost: a\r\n{head}", ""),
            (f"GET /Secret HTTP/1.1\r\nHost: a\r\n{head}", "Secret a"),
            ("GET /identities HTTP/1.1\r\nHost: a\r\nConnection: close\r\n", "x" * 65),
        ):  # fmt: skip
            more = f"X-Request-Id: {given}\r\n\r\n" if given else "\r\n"
            answer = talk(server.port, (start + more).encode() + body * (start == post)).decode()
            (request_id,) = re.findall(r"(?m)^x-request-id: (\S+)", answer)
            assert (request_id == given) == (start == post) and request_id.isascii()
            ids.append(request_id)
        path.rename(folder / "moved")
        headers = {"Authorization": f"Bearer {secret}", "X-Request-Id": "broken"}
        assert server.ask("GET", "/identities", headers=headers)[0] == 503
    logged = [text for name, _, text in caplog.record_tuples if name == limits_lib.ACCESS.name]
    lines = [line for line in map(json.loads, logged) if "health" not in line["route"]]
    reasons = [line.pop("reason", "") for line in lines]
    assert "(request broken)" in caplog.text
    assert "Secret" not in caplog.text and secret not in caplog.text
    fields = ("request_id", "method", "route", "status", "clips", "gallery")
    assert [tuple(line[field] for field in fields) for line in lines] == [
        (ids[0], "POST", "/enrol", 200, 2, 2), (ids[1], "DELETE", "/clips/{name}", 200, 1, 3),
        (ids[2], "GET", "other", 404, 0, 3), (ids[3], "GET", "other", 401, 0, 3),
        ("broken", "GET", "/identities", 503, 0, 3),
    ]  # fmt: skip
    refusals = "Not Found: see", "Authorization: Bearer", "gallery cannot be read"
    assert reasons[:2] == ["", ""]
    assert all(word in reason for word, reason in zip(refusals, reasons[2:], strict=True))
    for line in lines:
        assert line.keys() == {*fields, "time", "ms", "model"}
        assert datetime.fromisoformat(line["time"]).tzinfo and 0 <= line["ms"] < 60_000


def test_reasons_in_the_access_log_contain_no_names(inside, caplog):
    """The client gets the names, and the log gets the rest of the message, or the lines of code."""
    caplog.set_level(logging.INFO, limits_lib.ACCESS.name)
    good = servers.enrolment("Secret", 0)
    (clip,) = good["clips"]
    for change, answered, logged in (
        ({"clips": [clip, clip]}, "Secret 0", "occurs twice: rename one of the two clips"),
        ({"clips": [{"clip": "Secret", "secret": [1.0]}]}, "has only secret", "the gallery uses"),
        ({"clips": [{"clip": "Secret", "face": "x"}]}, "'face' must be", "UserError at clip_files"),
        ({"Secret": 1}, "unknown field `Secret`", "see /openapi.json"),
        ({"identity": "Secret "}, "'Secret '", "UserError at names.py"),
    ):  # fmt: skip
        status, answer = inside.ask("POST", "/enrol", good | change)
        assert status == 422 and answered in answer["error"]
        assert inside.ask("GET", "/identities")[0] == 200  # the log has the line before
        texts = [text for name, _, text in caplog.record_tuples if name == limits_lib.ACCESS.name]
        (line,) = [x for x in map(json.loads, texts) if x["route"] == "/enrol"]
        assert line["reason"].startswith(logged) and "ecret" not in caplog.text
        caplog.clear()


@pytest.mark.slow
def test_slow_malformed_or_ambiguous_requests_are_cut_off(inside):
    host, end = f"Host: 127.0.0.1:{inside.port}\r\n", "Connection: close\r\n\r\n"
    head = f"POST /identify HTTP/1.1\r\n{host}Content-Type: application/json\r\n"
    body, chunked = "Content-Length: 2\r\n\r\n{}", f"{head}Transfer-Encoding: chunked\r\n\r\n"
    for content, status, words in (  # 503: the rest of the body does not come
        (head + "Content-Length: 100\r\n\r\n{", 503, b""), (chunked + "5\r\n{\r\n", 503, b""),
        (head + "Content-Length: 99999999\r\n\r\n{", 413, b""),
        (head + "Content-Length: -5\r\n\r\n{", 400, b""),
        (head + "Content-Length: 5\r\nContent-Length: 7\r\n\r\n{", 400, b""),
        ("nonsense\r\n\r\n", 400, b""),
        (f"GET /identities HTTP/1.1\r\n{host}{host}{end}", 400, b"single header Host"),
        (f"GET /identities HTTP/1.1\r\n{end}", 400, b"single header Host"),
        (f"GET /identities HTTP/1.1\r\n{host}{end}", 200, b"x-content-type-options: nosniff"),
        (f"PUT /identities HTTP/1.1\r\n{host}{end}", 405, b"\r\nallow: "),
        (f"{head}Connection: Upgrade\r\nUpgrade: h2c\r\n{body}", 400, b"the header Upgrade"),
        (f"{head}Content-Encoding: gzip\r\n{body}", 415, b"without Content-Encoding"),
        (f"{head}Content-Encoding: identity\r\nConnection: close\r\n{body}", 422, b"clips"),
    ):  # fmt: skip
        answer = talk(inside.port, content.encode())
        assert int(answer.split()[1]) == status and words in answer, content[:200]
    # A body of 90 chunks of 64 KiB gets the answer 413, or is cut off while it is sent.
    too_long = chunked + 90 * f"10000\r\n{' ' * 65536}\r\n"
    with contextlib.suppress(ConnectionError):
        assert b" 413 " in talk(inside.port, too_long.encode())
    assert inside.ask("GET", web.LIVE)[0] == 200


def test_server_may_open_as_many_files_as_the_system_allows(people):
    """Otherwise, idle connections would leave no file for the check of a container."""
    _, hard = usual = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard // 2, hard))
    try:
        with servers.served(people.folder) as server:
            assert resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE) == (hard, hard)
            assert server.end() == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, usual)


def test_number_of_connections_is_limited(inside):
    time.sleep(0.1)  # the server closes connections of earlier tests
    with contextlib.ExitStack() as stack:
        for _ in range(SMALL.connections):
            stack.enter_context(socket.create_connection(("127.0.0.1", inside.port)))
        time.sleep(0.05)  # the server accepts the connections
        for path in ("/v2/health/ready", "/openapi.json", "/v2/health/live/"):
            assert inside.ask("GET", path) == (503, b"Service Unavailable")
        for _ in range(SMALL.connections):  # the check of a container restarts it otherwise
            assert inside.ask("GET", web.LIVE)[0] == 200
    time.sleep(0.05)  # the server closes the connections
    assert inside.ask("GET", "/v2/health/ready")[0] == 200


def test_limits_are_read_from_flags_and_variables(people, say, monkeypatch):
    served = []
    monkeypatch.setattr(web, "serve", lambda *words: served.append(words) or True)
    monkeypatch.setenv(terminal.QUIET, "1")
    monkeypatch.setenv("VIDJAX_SERVE_CLIPS", "7")
    monkeypatch.setenv("VIDJAX_SERVE_FRAMES", "8")
    monkeypatch.setenv("VIDJAX_SERVE_PORT", "tcp://10.0.0.1")  # as Kubernetes sets it
    (journal := people.folder / JOURNAL_FILE).write_bytes(bytes(512))  # of a killed process
    say("serve", f"--gallery={people.folder}", "--port=0", "--frames=9", "--answer-seconds=2.5")
    assert not journal.exists()
    ((app, _, limits, leaving),) = served
    assert limits == Limits(clips=7, frames=9, answer_seconds=2.5) and app.leaving is leaving
    for flag, words in {
        "--clips=0": "--clips=0: give a whole number, at least 1",
        "--answer-seconds=0": "--answer-seconds=0: give a number, above 0",
        "--lock-seconds=nan": "--lock-seconds=nan: give a number, at least 0",
        "--drain-seconds=-1": "at least 0 and at most 86,400",
        "--body-bytes=1000000000": "set held_bytes to 3000000000",
    }.items():
        assert words in (error := say("serve", "--gallery=x", flag, code=2))
        assert len(error.strip().splitlines()) == 1
    monkeypatch.setenv("VIDJAX_SERVE_FRAMES", "64MB")
    assert "SERVE_FRAMES=64MB: give a whole number" in say("serve", "--gallery=x", code=2)
    monkeypatch.setenv("VIDJAX_SERVE_CLIP", "3")
    assert "did you mean VIDJAX_SERVE_CLIPS?" in say("serve", "--gallery=x", code=2)


def test_help_server_and_page_list_every_limit(inside, capsys):
    with pytest.raises(SystemExit):
        program.main(["serve", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    shown = inside.ask("GET", "/openapi.json")[1]
    (of_path,) = shown["paths"]["/clips/{name}"]["delete"]["parameters"]
    assert of_path == {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    page = docs.SERVER.read_text()
    assert docs.update_limits(page) == page
    assert shown["info"]["x-limits"] == {name: getattr(SMALL, name) for name in LIMITS}
    for limit in LIMITS.values():
        assert f"{limit.flag} N {limit.meta.description} (default: {limit.text})" in text


def test_full_queue_refuses_with_retry_after_and_clients_that_go_delay_nobody():
    limits = Limits(waiting_clips=4, batch_clips=2, waiting_changes=1)
    batch_sizes, go = [], threading.Event()

    def answer(questions):
        batch_sizes.append(len(questions))
        assert go.wait(5)
        return [question.k for question in questions]

    async def run():
        batcher, changes = Batcher(answer, limits, ServerMetrics()), Changes(limits)

        def ask(number):
            return batcher.ask(Question({"a": {}}, k=number))

        # The queues are full: 4 questions wait behind a batch of 2, and a change is being made.
        asked = []
        for numbers in (range(3), range(3, 6)):
            asked += [asyncio.create_task(ask(n)) for n in numbers]
            await asyncio.sleep(0.05)  # at first, a batch of 2 begins
        slow = asyncio.create_task(changes.make(lambda: go.wait(5)))
        await asyncio.sleep(0.01)  # the change begins
        for work in (ask(9), changes.make(lambda: None)):
            with pytest.raises(Refused) as error:
                await work
            assert error.value.status == 429 and error.value.headers["retry-after"]
        for gone in (asked[0], asked[5]):  # in the batch, and in the queue
            gone.cancel()
        go.set()
        assert await slow
        answers = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 5)
        assert answers[1:5] == [1, 2, 3, 4] and max(batch_sizes) == 2 and sum(batch_sizes) == 5
        batcher.thread.shutdown()
        changes.thread.shutdown()

    asyncio.run(run())


def test_server_is_live_but_not_ready_while_programs_compile(people, monkeypatch):
    compiled = threading.Event()
    monkeypatch.setattr(batcher_lib, "warm", lambda gallery: compiled.wait(30))
    monkeypatch.setattr(Inside, "wait", lambda server: None)  # does not wait until it is ready
    with Inside(people) as server:
        assert server.ask("GET", web.LIVE)[0] == 200
        given = {"clips": servers.as_json(CLIPS)}
        gets = (("GET", x) for x in ("/v2/health/ready", "/threshold?fpir=0.5", "/identities"))
        for asked in (*gets, ("POST", "/identify", given), ("DELETE", "/identities/nobody")):
            status, answer = server.ask(*asked)
            assert status == 503 and "compiles" in answer["error"]
        compiled.set()


def test_removal_is_answered_after_earlier_answers_have_ended(folder, monkeypatch):
    """Otherwise a client could get an answer with the person after the removal was confirmed."""
    begun, go, identify = threading.Event(), threading.Event(), Gallery.identify

    def slow(people, clips, *more, **options):
        answers = identify(people, clips, *more, **options)
        if "query 0" in answers:
            begun.set()
            go.wait(10)
        return answers

    monkeypatch.setattr(Gallery, "identify", slow)
    with Inside(Gallery(folder)) as server, ThreadPoolExecutor(2) as pool:
        asked = {"clips": servers.as_json({"query 0": CLIPS["query 0"]})}
        answer = pool.submit(server.ask, "POST", "/identify", asked)
        assert begun.wait(10)
        removal = pool.submit(server.ask, "DELETE", "/identities/person%200")
        while "person 0" in Gallery(folder):
            time.sleep(0.01)
        time.sleep(0.2)
        assert not removal.done(), "an answer with the person is not sent yet"
        go.set()
        assert answer.result(10)[1]["clips"][0]["best"][0]["identity"] == "person 0"
        assert removal.result(10) == (200, {"removed": 1})


def test_answer_of_a_change_is_sent_although_the_memory_is_full(folder):
    with Inside(Gallery(folder)) as server:
        bodies = server.app.bodies
        given = {"clips": [{"clip": "q", "face": [[1] * 8] * 900}]}  # 24 kB; its arrays 58 kB
        for free, *asked in ((50_000, "POST", "/identify", given), (0, "GET", "/identities")):
            bodies._held = bodies._limits.held_bytes - free
            assert server.ask(*asked)[0] == 429
        assert [server.ask("DELETE", "/identities/person%200")[0] for _ in range(2)] == [200, 404]
        bodies._held = 0


def test_leaving_server_answers_and_closes_connections_but_is_not_ready(inside):
    request = f"GET /identities HTTP/1.1\r\nHost: 127.0.0.1:{inside.port}\r\n\r\n".encode()
    inside.app.leaving.set()
    try:
        answer = talk(inside.port, request)  # `talk` returns when the server closes the connection
        assert b" 200 OK" in answer and b"connection: close" in answer
        status, content = inside.ask("GET", "/v2/health/ready")
        assert status == 503 and "shutting down" in content["error"]
        assert inside.ask("GET", web.LIVE)[0] == 200
    finally:
        inside.app.leaving.clear()
    assert inside.ask("GET", "/v2/health/ready")[0] == 200


def test_answer_timeout_includes_the_wait_for_parsing(people, monkeypatch):
    """The time of `answer_seconds` starts when the body has arrived."""
    go = threading.Event()
    monkeypatch.setattr(app_lib.files, "npz_bytes", lambda *_: go.wait(20))
    limits = replace(SMALL, answer_seconds=0.3, request_seconds=20)
    with Inside(people, limits=limits) as server, ThreadPoolExecutor(2) as pool:
        sent = ("POST", "/identify?clip=a", b"PK", {"Content-Type": "application/x-npz"})
        began = time.monotonic()
        answers = [*pool.map(lambda _: server.ask(*sent), range(2))]  # the second waits for parsing
        assert answers == [(503, {"error": "the answer took too long: try again"})] * 2
        assert time.monotonic() - began < 5
        go.set()


@pytest.mark.slow
@pytest.mark.parametrize(("answer_s", "network_s", "logged"), [(2, 60, 1), (60, 2, 0)])
def test_unread_answers_count_as_memory_until_they_time_out(
    people, monkeypatch, caplog, answer_s, network_s, logged
):
    """The server ends and logs an answer after `answer_s`. Linux closes it after `network_s`."""
    monkeypatch.setattr(app_lib, "describe", lambda *_: "a long answer " * (1 << 20))  # 14 MiB
    limits = replace(SMALL, held_bytes=20 << 20, request_seconds=answer_s, unread_seconds=network_s)
    with Inside(people, limits=limits) as server:
        caplog.clear()
        with socket.create_connection(("127.0.0.1", server.port)) as unread:
            unread.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert unread.recv(8) == b"HTTP/1.1"  # the rest of the answer stays unread
            assert server.ask("GET", "/openapi.json")[0] == 429  # 2 x 14 MiB exceed 20 MiB
            time.sleep(3)  # longer than the shorter limit of 2 seconds
            assert server.ask("GET", "/openapi.json")[0] == 200
            end = time.monotonic() + 30
            while not logged and server.server.server_state.connections:  # it closes them
                assert time.monotonic() < end
                time.sleep(0.1)
    assert [(x.name, x.exc_info) for x in caplog.records] == [("uvicorn.error", None)] * logged


@pytest.mark.slow
def test_signal_ends_the_server_despite_a_stuck_thread(folder):
    flags = ("--lock-seconds=600", "--drain-seconds=1", "--end-seconds=1")
    with servers.served(folder, *flags) as server, ThreadPoolExecutor(1) as pool:
        with Gallery(folder)._store.open(write=True):  # the removal waits for this lock
            pool.submit(server.ask, "DELETE", "/identities/person%203")
            time.sleep(1)
            began = time.monotonic()
            assert server.end() == 1
            assert time.monotonic() - began < 10
        assert (log := server.process.stderr)
        last = "the server has ended before its work was finished: repeat unanswered requests"
        assert log.read().splitlines()[-1] == last
    assert Gallery(folder).identities["person 3"] == 4, "none of the 4 clips was removed"


def test_application_in_a_foreign_server_prints_no_names(folder, capfd, recwarn):
    with Inside(Gallery(folder)) as server:
        for name in ("Zoe Secret", "zoe secret"):  # alike, and each with the clips of one day
            body = servers.enrolment(name, 0)
            body["clips"] += [{**body["clips"][0], "clip": f"{name} 1"}]
            answer = server.ask("POST", "/enrol", body)[1]
        assert answer["similar"] == {"zoe secret": "Zoe Secret"}
    assert "ecret" not in "".join(capfd.readouterr()) and not recwarn.list
