"""Jobs: both stores, the routes, the kinds of jobs, and Celery's workers, killed ones too."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
import redis
from debian import program, redis_server, wait_for_port
from fastapi.testclient import TestClient
from PIL import Image
from serving import ADMIN, Running, free_port, running
from tiny_models import ANOTHER, CONFIG, KEY, check_error, client_for, photo_jpeg, post_photo, save_classifier

from pillsnap.answer.gallery.gallery_file import read_gallery
from pillsnap.bench.scale.jobs import kill
from pillsnap.config.schema import Jobs, Settings
from pillsnap.scale.jobs import running as worker_side
from pillsnap.scale.jobs.running import Runner, run_next
from pillsnap.scale.jobs.work import Models
from pillsnap.service.jobs.job import JobsError, StoreDown, TooManyJobs
from pillsnap.service.jobs.queue import JobQueue, LeaseLost, open_queue

OTHER = {"X-API-Key": ANOTHER}
ZIP = {"Content-Type": "application/zip"}


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Redis server for this file."""
    with redis_server(tmp_path_factory.mktemp("redis"), port := free_port()):
        yield f"redis://127.0.0.1:{port}/0"


@pytest.fixture(params=["sqlite", "redis"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty store of each kind."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'store' / 'jobs.db'}"
        return
    address = request.getfixturevalue("redis_url")
    redis.Redis.from_url(address).flushall()
    yield address


@pytest.fixture
def open_one(url: str, tmp_path: Path) -> Callable[..., JobQueue]:
    """Opens the queue again and again, with other limits."""
    return lambda **limits: open_queue(Jobs(**limits), url, tmp_path)


def zipped(photos: dict[str, bytes]) -> bytes:
    with zipfile.ZipFile(body := io.BytesIO(), "w") as archive:
        for name, data in photos.items():
            archive.writestr(name, data)
    return body.getvalue()


# ---- The stores


def test_a_job_is_taken_by_one_worker_and_ended_once(open_one: Callable[..., JobQueue]) -> None:
    queue = open_one(queued=40)
    sent = [queue.add("predict", "key", {"number": number}) for number in range(30)]
    with ThreadPoolExecutor(6) as threads:
        taken = list(threads.map(lambda _: open_one().claim(), range(36)))
    mine = [job for job in taken if job is not None]
    assert sorted(job.id for job in mine) == sorted(job.id for job in sent)
    with ThreadPoolExecutor(6) as threads:  # every message comes twice
        ends = list(threads.map(lambda job: queue.finish(job, "done", {"by": job.lease}), mine + mine))
    assert all(ends) and not queue.store.open_jobs() and queue.claim() is None
    stored = queue.store.jobs_of("key")
    assert [job.parameters["number"] for job in stored] == list(range(30))
    assert all(job.result == {"by": job.lease} and job.attempts == 1 for job in stored)


def test_a_silent_worker_loses_its_job_and_its_result_does_not_count(open_one: Callable[..., JobQueue]) -> None:
    queue = open_one(lease_seconds=1, attempts=2)
    queue.add("predict", "key", {})
    first = queue.claim()
    queue.renew(first, 1, 9)
    assert queue.claim() is None and queue.store.read(first.id).done == 1
    time.sleep(1.1)
    second = queue.claim()
    assert second.id == first.id and second.attempts == 2
    with pytest.raises(LeaseLost, match="another worker's"):
        queue.renew(first, 2, 9)
    assert not queue.finish(first, "done", {"by": "first"}) and queue.finish(second, "done", {"by": "second"})
    assert not queue.finish(first, "failed") and queue.store.read(first.id).result == {"by": "second"}


def test_a_job_that_loses_every_worker_fails(open_one: Callable[..., JobQueue]) -> None:
    queue = open_one(lease_seconds=1, attempts=1)
    job = queue.add("predict", "key", {})
    assert queue.claim() is not None
    queue.folder_of(job.id).mkdir(parents=True)
    time.sleep(1.1)
    assert queue.claim() is None and queue.waiting() == 0 and not queue.folder_of(job.id).exists()
    assert queue.store.read(job.id).state == "failed" and "1 workers were lost" in queue.store.read(job.id).problem


def test_limits_cancelling_and_removal(open_one: Callable[..., JobQueue]) -> None:
    queue = open_one(queued=2)
    first, second = queue.add("predict", "key", {}), queue.add("style", "key", {})
    with pytest.raises(TooManyJobs, match="2 open jobs"):
        queue.add("predict", "key", {})
    queue.add("predict", "another", {})
    queue.cancel(second.id)
    assert queue.store.read(second.id).state == "cancelled"
    queue.cancel(second.id)
    taken = queue.claim()
    queue.cancel(taken.id)
    assert taken.id == first.id and queue.store.read(first.id).cancel
    assert queue.finish(taken, "cancelled") and len(queue.store.open_jobs()) == 1
    queue.folder_of(first.id).mkdir(parents=True)
    (abandoned := queue.folder_of("f" * 32)).mkdir()
    (foreign := queue.folder / "photos").mkdir()
    for folder in (abandoned, foreign):
        os.utime(folder, (1, 1))
    assert queue.expire() == [] and not abandoned.exists() and queue.folder_of(first.id).exists()
    time.sleep(0.05)
    assert set(replace(queue, limits=Jobs(hours=1e-6)).expire()) == {first.id, second.id}
    assert not queue.folder_of(first.id).exists() and queue.store.read(first.id) is None
    assert foreign.exists(), "it is no folder of a job, whoever it belongs to"
    [waited] = queue.store.jobs_of("another")
    assert waited.state == "failed" and "No worker took it" in waited.problem and not queue.store.jobs_of("key")


# ---- The routes and the kinds of jobs, with a worker in this process


@contextmanager
def service(models: Path, folder: Path, *settings: str, **more: object) -> Iterator[tuple[TestClient, Runner]]:
    """A service and what its worker would do."""
    chosen = [f"jobs.folder={folder / 'jobs'}", "serve.requests_per_minute=0", *settings]
    with client_for(models, (KEY["X-API-Key"], ANOTHER), *chosen, **more) as client:
        queue = client.app.state.service.jobs
        yield client, Runner(queue, Settings(jobs=queue.limits), Models(models, Settings()), patience=1)


def send(client: TestClient, photos: dict[str, bytes], query: str = "", headers: dict[str, str] = KEY) -> dict:
    response = client.post(f"/jobs{query}", headers={**headers, **ZIP}, content=zipped(photos))
    assert response.status_code == 202, response.text
    return response.json()


def show(client: TestClient, job: dict) -> dict:
    return client.get(f"/jobs/{job['id']}", headers=KEY).json()


def without_times(prediction: dict) -> dict:
    return {name: value for name, value in prediction.items() if name != "timings_ms"}


@pytest.mark.parametrize("pipeline", ["single", "combo"])
def test_answers_are_those_of_predict(models: Path, tmp_path: Path, pipeline: str) -> None:
    photos = {f"{number:03}.jpg": photo_jpeg(0.8 + number / 1000) for number in range(60)} | {"bad.png": b"no photo"}
    with service(models, tmp_path) as (client, runner):
        job = send(client, photos, f"?pipeline={pipeline}&top_k=2")
        assert job["state"] == "queued" and "No worker" in job["notes"][0]
        assert run_next(runner) and not run_next(runner)
        done = show(client, job)
        assert done["state"] == "done" and (done["done"], done["total"]) == (61, 61) and not done["notes"]
        assert done["result"]["photos"] == 61 and done["result"]["problems"] == 1
        lines = client.get(done["result_url"], headers=KEY)
        answers = [json.loads(line) for line in lines.text.splitlines()]
        assert lines.headers["content-type"] == "application/x-ndjson" and [one["photo"] for one in answers] == [
            *photos
        ]
        assert answers[-1]["problem"]["code"] == "not_an_image" and answers[-1]["prediction"] is None
        for number in (0, 59):
            answer = post_photo(client, photos[f"{number:03}.jpg"], f"?pipeline={pipeline}&top_k=2").json()
            assert without_times(answers[number]["prediction"]) == without_times(answer)
        assert len(list(runner.queue.folder_of(job["id"]).iterdir())) == 1


def test_evaluation_gallery_and_style(tmp_path: Path) -> None:
    (models := tmp_path / "models").mkdir()
    save_classifier(models, embeddings=True)
    white = photo_jpeg()
    colours = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
    Image.fromarray(colours).save(look := io.BytesIO(), "PNG")
    with service(models, tmp_path) as (client, runner):
        named = {"K-000007 Red capsule/front.jpg": white, "K-000030/1.jpg": white, "New tablet/1.jpg": white}
        jobs = [
            send(client, named, "?kind=evaluate&pipeline=combo&top_k=1"),  # which it does not mind
            send(
                client, {"K-000030/front.jpg": white, "New tablet/a.jpg": photo_jpeg(0.6)}, "?kind=gallery&whole=true"
            ),
            send(client, {"look.png": look.getvalue()}, "?kind=style&epochs=1&lr=0.001&n_basis=2"),
        ]
        many = {f"{number}.png": look.getvalue() for number in range(201)}
        refused = client.post("/jobs?kind=style", headers={**KEY, **ZIP}, content=zipped(many))
        check_error(refused, 422, "201 photos: send 200 at most")
        while run_next(runner):
            pass
        evaluated, gallery, style = (show(client, job) for job in jobs)
        assert evaluated["result"]["compared"] == 2 and evaluated["result"]["top1"] == 0.5
        assert evaluated["result"]["top5"] == 1
        whole = client.get(evaluated["result_url"], headers=KEY).json()
        assert set(whole["drugs"]) == {"K-000007", "K-000030"} and sum(whole["other_drugs"].values()) == 1
        file = tmp_path / "gallery.npz"
        file.write_bytes(client.get(gallery["result_url"], headers=KEY).content)
        assert {drug.name for drug in read_gallery(file).drugs.values()} == {"White round tablet", "New tablet"}
        assert style["state"] == "done" and style["total"] == 8
        assert len(client.get(style["result_url"], headers=KEY).content) > 10_000


def test_a_job_goes_on_where_another_worker_stopped(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = {f"{number:03}.jpg": photo_jpeg(0.9) for number in range(120)}
    with service(models, tmp_path, "jobs.lease_seconds=1") as (client, runner):
        job = send(client, photos)
        folder = runner.queue.folder_of(job["id"])

        class Killed(BaseException):
            """As if the process had been killed."""

        def kill(work: object) -> None:
            original = worker_side.predict
            stop = replace(work, progress=lambda done, total: (_ for _ in ()).throw(Killed()) if done >= 100 else None)
            original(stop)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setitem(worker_side.KINDS, "predict", kill)
            run_next(runner)
        before = {path.name: path.stat().st_mtime_ns for path in folder.glob("part-*")}
        assert len(before) == 2 and show(client, job)["state"] == "running"
        time.sleep(1.1)
        kept = {}

        def watched(work: object) -> dict:
            result = worker_side.predict(work)
            kept.update({path.name: path.stat().st_mtime_ns for path in folder.glob("part-*")})
            return result

        monkeypatch.setitem(worker_side.KINDS, "predict", watched)
        assert run_next(runner)
        assert before.items() < kept.items() and show(client, job)["attempts"] == 2
        assert len(client.get(f"/jobs/{job['id']}/result", headers=KEY).text.splitlines()) == 120


def test_a_running_job_is_cancelled_and_its_files_go(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with service(models, tmp_path, "jobs.lease_seconds=1") as (client, runner):
        job = send(client, {"a.jpg": photo_jpeg()})

        def slow(work: object) -> dict:
            assert "ends in a moment" in client.post(f"/jobs/{job['id']}/cancel", headers=KEY).json()["notes"][0]
            time.sleep(0.6)
            work.progress(1, 2)
            raise AssertionError("it was cancelled")

        monkeypatch.setitem(worker_side.KINDS, "predict", slow)
        assert run_next(runner)
        assert show(client, job)["state"] == "cancelled" and not list(runner.queue.folder_of(job["id"]).iterdir())
        check_error(client.get(f"/jobs/{job['id']}/result", headers=KEY), 409, "cancelled: send it again")


# ---- What is refused


def test_jobs_of_another_key_do_not_exist(models: Path, tmp_path: Path) -> None:
    with service(models, tmp_path) as (client, _):
        job = send(client, {"a.jpg": photo_jpeg()})
        for method, path in (("get", ""), ("get", "/result"), ("post", "/cancel")):
            theirs = client.request(method, f"/jobs/{job['id']}{path}", headers=OTHER)
            nobody = client.request(method, f"/jobs/{'0' * 32}{path}", headers=OTHER)
            check_error(theirs, 404, "no such job")
            assert theirs.json()["detail"] == nobody.json()["detail"]
        assert client.get("/jobs", headers=OTHER).json() == {"jobs": []} and show(client, job)["state"] == "queued"
        assert client.get("/jobs").status_code == 401


BAD = {
    "a bomb": ({"a.png": bytes(30_000_000)}, "would unpack to 30 MB"),
    "paths that leave it": ({"../../etc/cron.d/a.jpg": b"photo"}, "leads out of it"),
    "an absolute path": ({"/etc/a.jpg": b"photo"}, "leads out of it"),
    "a Windows path": ({"..\\..\\a.jpg": b"photo"}, "leads out of it"),
    "no photo": ({"a.txt": b"photo"}, "no photo"),
    "too many photos": ({f"{number}.jpg": b"photo" for number in range(6)}, "6 photos: send 5"),
    "nothing": ({}, "no photo"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_archives(models: Path, tmp_path: Path, what: str) -> None:
    photos, reason = BAD[what]
    with zipfile.ZipFile(body := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in photos.items():
            archive.writestr(name, data)
    with service(models, tmp_path, "jobs.photos=5", "serve.max_image_mb=50") as (client, runner):
        check_error(client.post("/jobs", headers={**KEY, **ZIP}, content=body.getvalue()), 422, reason)
        assert not list(runner.queue.folder.glob("*/")) and not runner.queue.store.open_jobs()


def test_overlapping_entries_encryption_and_links(models: Path, tmp_path: Path) -> None:
    whole = zipped({"a.jpg": bytes(range(256)) * 40})
    at = whole.index(b"PK\x01\x02")
    entry, end = whole[at : whole.index(b"PK\x05\x06")], bytearray(whole[whole.index(b"PK\x05\x06") :])
    entries = b"".join(entry.replace(b"a.jpg", b"%c.jpg" % (97 + number)) for number in range(9))
    end[8:12], end[12:16] = 2 * (9).to_bytes(2, "little"), len(entries).to_bytes(4, "little")
    overlapping = whole[:at] + entries + bytes(end)
    encrypted = bytearray(whole)
    encrypted[at + 8] |= 1
    link = zipfile.ZipInfo("a.jpg")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(linked := io.BytesIO(), "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with service(models, tmp_path) as (client, _):
        for body, reason in (
            (overlapping, "never do"),
            (bytes(encrypted), "encrypted"),
            (linked.getvalue(), "leads out"),
            (whole[: len(whole) // 2], "damaged"),
            (b"", "no ZIP"),
        ):
            check_error(client.post("/jobs", headers={**KEY, **ZIP}, content=body), 422, reason)


def test_limits_of_a_key(models: Path, tmp_path: Path) -> None:
    with service(models, tmp_path, "jobs.queued=1", "jobs.zip_mb=0.01") as (client, runner):
        job = send(client, {"a.jpg": b"photo"})
        refused = client.post("/jobs", headers={**KEY, **ZIP}, content=zipped({"a.jpg": b"photo"}))
        check_error(refused, 429, "1 open jobs")
        assert refused.headers["retry-after"] == "60"
        check_error(client.post("/jobs", headers={**OTHER, **ZIP}, content=bytes(200_000)), 413, "0.01 MB")
        check_error(client.post("/jobs", headers=OTHER, files={"image": b"photo"}), 415, "no ZIP")
        check_error(client.post("/jobs?kind=nothing", headers={**OTHER, **ZIP}, content=b""), 422, "kind")
        check_error(client.get(f"/jobs/{job['id']}/result", headers=KEY), 409, "queued")
        assert len(list(runner.queue.folder.glob("*/"))) == 1
        client.post(f"/jobs/{job['id']}/cancel", headers=KEY)
        assert not list(runner.queue.folder.glob("*/"))
        send(client, {"a.jpg": b"photo"})


def test_a_result_of_another_model_says_so(models: Path, tmp_path: Path) -> None:
    with service(models, tmp_path) as (client, runner):
        job = send(client, {"a.jpg": photo_jpeg()})
        run_next(runner)
        made = show(client, job)["result"]["model"]
        loaded = client.app.state.service.model_manager.loaded
        client.app.state.service.model_manager.loaded = replace(loaded, model=loaded.model | {"version": "f" * 12})
        note = show(client, job)["notes"][0]
        assert f"of the model {made}" in note and "f" * 12 in note
        assert client.get(f"/jobs/{job['id']}/result", headers=KEY).headers["x-model"] == made


# ---- Redis that is not there


def test_a_store_that_is_down_is_said(models: Path, tmp_path: Path) -> None:
    with redis_server(tmp_path / "redis", port := free_port()) as server:
        address = f"redis://:nobody@127.0.0.1:{port}/0".replace(":nobody@", "")
        with service(models, tmp_path, f"jobs.url={address}") as (client, runner):
            job = send(client, {"a.jpg": photo_jpeg()})
            taken = runner.queue.claim()
            server.terminate()
            server.wait()
            for response in (
                client.post("/jobs", headers={**KEY, **ZIP}, content=zipped({"a.jpg": b"photo"})),
                client.get(f"/jobs/{job['id']}", headers=KEY),
                client.get("/jobs", headers=KEY),
            ):
                check_error(response, 503, "Redis at redis://127.0.0.1")
            assert post_photo(client, photo_jpeg()).status_code == 200, "predictions need no Redis"
            assert not worker_side._finish(runner, taken, "done", {"file": "x"}), "patience ends"
            with redis_server(tmp_path / "redis", port):
                assert show(client, job)["state"] == "running"
                assert (
                    worker_side._finish(runner, taken, "done", {"file": "x"}) and show(client, job)["state"] == "done"
                )


def test_a_service_starts_while_redis_is_down(models: Path, tmp_path: Path) -> None:
    with service(models, tmp_path, "jobs.url=redis://127.0.0.1:9/0") as (client, runner):
        check_error(client.post("/jobs", headers={**KEY, **ZIP}, content=zipped({"a.jpg": b"x"})), 503, "Redis at")
        assert post_photo(client, photo_jpeg()).status_code == 200
        with pytest.raises(StoreDown):
            run_next(runner)


def test_addresses_that_have_no_jobs(tmp_path: Path) -> None:
    for address, reason in (
        ("amqp://guest:secret@host//", "has no jobs"),
        ("redis://host:port", "no address of Redis"),
    ):
        with pytest.raises((JobsError, ValueError), match=reason) as caught:
            open_queue(Jobs(url=address), root=tmp_path)
        assert "secret" not in str(caught.value)


# ---- Celery's workers


def worker(folder: Path, log: str = "worker.log") -> subprocess.Popen:
    """Start `celery -A pillsnap.scale.worker worker -Q ml_tasks` in a folder."""
    variables = {**os.environ, "PYTHONPATH": str(CONFIG.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "celery", "-A", "pillsnap.scale.worker", "worker", "-Q", "ml_tasks"]
    with (folder / log).open("a", encoding="utf-8") as file:
        return subprocess.Popen(command, cwd=folder, env=variables, stdout=file, stderr=file)


def until(condition: Callable[[], object], seconds: float, log: Path) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, log.read_text(encoding="utf-8")[-3000:]
        time.sleep(0.1)


def settings_of_workers(folder: Path, models: Path, url: str, **limits: float) -> None:
    section = "".join(f"  {name}: {value}\n" for name, value in {"url": url, "folder": "jobs", **limits}.items())
    (folder / "config.yaml").write_text(f"jobs:\n{section}", encoding="utf-8")
    (folder / ".env").write_text(f"MODEL_PATH={models}\n", encoding="utf-8")


def test_a_killed_worker_loses_nothing(models: Path, tmp_path: Path, url: str) -> None:
    """A worker is killed with all its processes; the next one has the job within half a minute, and ends it once."""
    settings_of_workers(tmp_path, models, url)
    photos = {f"{number:04}.jpg": photo_jpeg(0.9) for number in range(400)}
    with service(models, tmp_path, f"jobs.url={url}") as (client, runner):
        first, job = worker(tmp_path), send(client, photos)
        folder = runner.queue.folder_of(job["id"])
        log = tmp_path / "worker.log"
        until(lambda: list(folder.glob("part-*")), 60, log)
        kill(first)
        killed = time.monotonic()
        second = worker(tmp_path)
        until(lambda: show(client, job)["attempts"] == 2, 30, log)
        assert time.monotonic() - killed < 30
        until(lambda: show(client, job)["state"] == "done", 60, log)
        done = show(client, job)
        assert done["attempts"] == 2 and done["started"]
        answers = client.get(done["result_url"], headers=KEY).text.splitlines()
        assert [json.loads(line)["photo"] for line in answers] == [*photos]
        small = time.monotonic()
        job = send(client, {"a.jpg": photo_jpeg()})
        assert job["notes"] == [], "a worker is there"
        until(lambda: show(client, job)["state"] == "done", 10, log)
        assert time.monotonic() - small < 5
        second.send_signal(signal.SIGTERM)
        assert second.wait(30) == 0


def test_killed_workers_lose_and_repeat_nothing(models: Path, tmp_path: Path, redis_url: str) -> None:
    redis.Redis.from_url(redis_url).flushall()
    settings_of_workers(tmp_path, models, redis_url, lease_seconds=2)
    log = tmp_path / "worker.log"
    with service(models, tmp_path, f"jobs.url={redis_url}", "jobs.queued=60") as (client, runner):
        jobs = [send(client, {"a.jpg": photo_jpeg()}) for _ in range(60)]
        for left in (40, 20, 0):
            process = worker(tmp_path)
            until(lambda most=left: len(runner.queue.store.open_jobs()) <= most, 60, log)
            kill(process)
        found = [show(client, job) for job in jobs]
        assert {job["state"] for job in found} == {"done"}
        for job in found:
            assert len(client.get(job["result_url"], headers=KEY).text.splitlines()) == 1
            assert len(list(runner.queue.folder_of(job["id"]).glob("result-*"))) == 1
    ends = re.findall(r"job ([0-9a-f]{32}): done", log.read_text(encoding="utf-8"))
    assert len(ends) == len(set(ends)) > 50


def test_a_worker_waits_for_a_redis_that_stops(models: Path, tmp_path: Path) -> None:
    url, log = f"redis://127.0.0.1:{(port := free_port())}/0", tmp_path / "worker.log"
    settings_of_workers(tmp_path, models, url)
    with redis_server(tmp_path / "redis", port) as server, service(models, tmp_path, f"jobs.url={url}") as (client, _):
        process, job = worker(tmp_path), send(client, {"a.jpg": photo_jpeg()})
        until(lambda: show(client, job)["state"] == "done", 60, log)
        server.terminate()
        server.wait()
        until(lambda: "can't look for jobs now" in log.read_text(encoding="utf-8"), 20, log)
        with redis_server(tmp_path / "redis", port):
            job = send(client, {"a.jpg": photo_jpeg()})
            until(lambda: show(client, job)["state"] == "done", 30, log)
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
    text = log.read_text(encoding="utf-8")
    assert "Connection to broker lost" in text and "Traceback" not in text


def test_a_worker_without_its_store_ends_with_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("jobs:\n  url: redis://127.0.0.1:9/0\n", encoding="utf-8")
    process = worker(tmp_path)
    assert process.wait(60) == 1
    lines = (tmp_path / "worker.log").read_text(encoding="utf-8").splitlines()
    assert "Traceback" not in "\n".join(lines) and lines[-1].startswith("Redis at redis://127.0.0.1:9/0, which has the")


# ---- Two services behind nginx, with one Redis


@pytest.fixture
def proxy(tmp_path: Path, redis_url: str) -> Iterator[tuple[str, list[Running], Path]]:
    """The address of nginx with the configuration in operation/, its two services, and the folder of their models."""
    (first := tmp_path / "place" / "first").mkdir(parents=True)
    save_classifier(first, embeddings=True)
    redis.Redis.from_url(redis_url).flushall()
    port, lines = free_port(), f"  model_root: {tmp_path / 'place'}\njobs:\n  url: {redis_url}\n  folder: ../jobs\n"
    limits = "  requests_per_minute: 8\n"
    with ExitStack() as stack:
        servers = [stack.enter_context(running(first, tmp_path / name, lines, limits=limits)) for name in ("a", "b")]
        text = (CONFIG.parent / "operation" / "nginx.conf").read_text(encoding="utf-8")
        for old, server in zip(("127.0.0.1:8001", "127.0.0.1:8002"), servers, strict=True):
            text = text.replace(old, server.url.removeprefix("http://"))
        (conf := tmp_path / "nginx.conf").write_text(
            f"daemon off;\npid {tmp_path}/nginx.pid;\nerror_log {tmp_path}/error.log;\nevents {{}}\nhttp {{\n"
            f"access_log off;\nclient_body_temp_path {tmp_path}/body;\nproxy_temp_path {tmp_path}/proxy;\n"
            f"{text.replace('listen 8000', f'listen 127.0.0.1:{port}')}\n}}\n"
        )
        process = subprocess.Popen([program("nginx", "nginx"), "-c", str(conf), "-p", str(tmp_path)])
        stack.callback(process.wait, 10)
        stack.callback(process.terminate)
        wait_for_port(port)
        yield f"http://127.0.0.1:{port}", servers, tmp_path / "place"


def versions(servers: list[Running]) -> list[str | None]:
    models = [httpx.get(f"{server.url}/version", headers=KEY).json()["model"] for server in servers]
    return [model and model["version"] for model in models]


def drugs_of(servers: list[Running]) -> list[list[str]]:
    found = [httpx.get(f"{server.url}/gallery", headers=KEY).json()["drugs"] for server in servers]
    return [[drug["name"] for drug in drugs] for drugs in found]


def test_two_processes_of_a_service_are_one(tmp_path: Path, redis_url: str) -> None:
    """`uvicorn --workers 2`."""
    for name in ("first", "second"):
        (tmp_path / "place" / name).mkdir(parents=True)
        save_classifier(tmp_path / "place" / name, embeddings=name == "first")
    redis.Redis.from_url(redis_url).flushall()
    lines, limits = f"  model_root: {tmp_path / 'place'}\njobs:\n  url: {redis_url}\n", "  requests_per_minute: 6\n"
    first, admin = tmp_path / "place" / "first", {"X-Admin-Key": ADMIN}
    with running(first, tmp_path / "service", lines, "--workers", "2", limits=limits) as server:
        photo = {"image": photo_jpeg()}
        statuses = [httpx.post(f"{server.url}/predict", headers=KEY, files=photo).status_code for _ in range(8)]
        assert statuses == [200] * 6 + [429] * 2, "the limit is of both together"
        reloaded = httpx.post(f"{server.url}/reload", headers=admin, json={"folder": "second"}, timeout=30)
        assert reloaded.status_code == 200, reloaded.text
        new = reloaded.json()["model"]["version"]
        until(lambda: set(versions([server] * 12)) == {new}, 20, server.log)


def test_two_services_behind_nginx_are_one(proxy: tuple[str, list[Running], Path], redis_url: str) -> None:
    url, servers, place = proxy
    of_worker = Models(place / "first", Settings(), redis_url, place)
    log, photo = servers[1].log, photo_jpeg()
    with httpx.Client(base_url=url, headers=KEY, timeout=30) as client:
        job = client.post("/jobs?kind=style", headers=ZIP, content=zipped({"a.jpg": photo})).json()
        seen = [client.get(f"/jobs/{job['id']}").json()["state"] for _ in range(4)]
        assert seen == ["queued"] * 4, "whichever is asked"
        statuses = [client.post("/predict", files={"image": photo}).status_code for _ in range(10)]
        assert statuses == [200] * 8 + [429] * 2, "the limit is of both together"
        before = versions(servers)
        assert of_worker.get().model["version"] == before[0] and of_worker.gallery == "none"
        enrolled = client.post(
            "/gallery",
            headers={"X-Admin-Key": ADMIN},
            data={"name": "New tablet", "whole": "true"},
            files=[("images", ("front.jpg", photo))],
        )
        assert enrolled.status_code == 200, enrolled.text
        until(lambda: drugs_of(servers) == [["New tablet"]] * 2, 20, log)
        assert of_worker.get().model["version"] == before[0] and len(of_worker.gallery) == 12
        (second := place / "second").mkdir()
        save_classifier(second)
        reloaded = client.post("/reload", headers={"X-Admin-Key": ADMIN}, json={"folder": "second"})
        assert reloaded.status_code == 200, reloaded.text
        new = reloaded.json()["model"]["version"]
        until(lambda: versions(servers) == [new] * 2, 20, log)
        assert before[0] == before[1] != new and drugs_of(servers) == [[], []]
        assert of_worker.get().model["version"] == new, "a worker follows with its next job"
        served = [httpx.get(f"{server.url}/metrics", headers=KEY).text for server in servers]
        assert sum('route="/predict",status="200"' in text for text in served) == 2, "both have answered"
        assert sum('pillsnap_jobs{state="queued"} 1.0' in text for text in served) == 2, "both have one queue"
        servers[0].process.terminate()
        servers[0].process.wait(30)
        assert [client.get("/ready").status_code for _ in range(6)] == [200] * 6
