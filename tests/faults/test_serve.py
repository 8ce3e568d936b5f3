"""A server that is attacked, killed and crowded; the campaign of the same name does it for long."""

import pytest

from tests.helpers import servers

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("httptools")

from tests.campaigns import serve

pytestmark = pytest.mark.slow


def test_hostile_requests_get_an_answer_and_cost_no_memory(tmp_path, fault_seed, campaign):
    servers.make_gallery(tmp_path / "g")
    statuses, (half, end) = serve.attack(tmp_path / "g", 2000 if campaign else 200, fault_seed)
    assert statuses[422] > statuses.total() / 4 and max(statuses) < 500
    assert end <= half + 64


def test_what_a_killed_server_answered_is_there_and_nobody_removed_is_named(tmp_path, fault_seed):
    servers.make_gallery(tmp_path / "g")
    found = serve.kill(tmp_path / "g", 20, 4, fault_seed)
    assert found["kills"] >= 2 and found["changes"] >= 10 and found["answers"] >= 10


def test_a_server_survives_a_crowd(tmp_path):
    servers.make_gallery(tmp_path / "g")
    found = serve.crowd(tmp_path / "g", 1500)
    assert found["opened"] >= 800 and found["memory_after"] <= found["memory_before"] + 64
