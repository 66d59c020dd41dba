"""Answers for all photos of a ZIP, by a server: API_KEY=... python examples/send_job.py photos.zip http://localhost:8000"""

import json
import os
import sys
import time

import httpx

path, url = sys.argv[1], sys.argv[2]
headers = {"X-API-Key": os.environ.get("API_KEY", "")}
with httpx.Client(base_url=url, headers=headers, timeout=httpx.Timeout(60, write=None)) as client:

    def ask(method: str, address: str, **more: object) -> httpx.Response:
        try:
            response = client.request(method, address, **more)
            if response.is_error:
                sys.exit(response.json()["detail"])
        except httpx.HTTPError as error:
            sys.exit(f"{url} does not answer ({error}): see that the server runs, and that the address is right.")
        except (ValueError, KeyError, TypeError):
            sys.exit(f"What answers at {url} is no pillsnap ({response.status_code}): see that the address is right.")
        return response

    with open(path, "rb") as file:
        sent = ask("POST", "/jobs", content=file, headers={"Content-Type": "application/zip"})
    if not sent.headers.get("content-type", "").startswith("application/json"):
        sys.exit(f"What answers at {url} is no pillsnap ({sent.status_code}): see that the address is right.")
    job = sent.json()
    while job["state"] in ("queued", "running"):
        print(f"{job['state']} {job['done']}/{job['total']}", *job["notes"], file=sys.stderr)
        time.sleep(1)
        job = ask("GET", f"/jobs/{job['id']}").json()
    if job["state"] != "done":
        sys.exit(job["problem"] or job["state"])
    for line in ask("GET", job["result_url"]).text.splitlines():
        answer = json.loads(line)
        pills = answer["prediction"] and " ".join(pill["code"] for pill in answer["prediction"]["pills"])
        print(f"{answer['photo']}: {pills or answer['problem']['detail']}")
