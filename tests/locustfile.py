"""Load on a server by Locust (`pip install locust`): more than it can serve, and whether what it serves is whole.

    cosyq serve -a ARTIFACT --queue 4
    locust -f tests/locustfile.py --headless -H http://127.0.0.1:8000 -u 4 -t 1m               # what it can serve, a second
    locust -f tests/locustfile.py --headless -H http://127.0.0.1:8000 -u 24 -t 10m --rate 3.0 --leave 0.1 --pid PID

With --rate, so many requests a second are begun however long they take; without, every user asks again when it has
heard all. Voices go round. An answer of 200 has to be what the same voice, text and seed gave before, to the byte; one
of 429 has to say when to come again; any other is a failure, and Locust's exit code is 1. Some users leave early. Prints a
line of JSON at the end, with the memory of the process PID at each tenth of the time, in MiB.
"""

import hashlib
import json
import random
import time
from collections import Counter
from itertools import count

import gevent
from locust import HttpUser, constant_throughput, events, task

TEXTS = ("Hello there.", "Good night, and thank you very much.")  # short: it is requests that leave something behind
SEEDS = 2
RATE = 24_000

outcomes: Counter = Counter()
heard: dict = {}  # (voice, text, seed): digest and bytes
memory: list = []
numbers = count()


@events.init_command_line_parser.add_listener
def options(parser):
    parser.add_argument("--rate", type=float, default=0.0, help="Requests a second, of all users together")
    parser.add_argument("--leave", type=float, default=0.0, help="Share of users' requests that they leave early")
    parser.add_argument("--pid", type=int, help="The server's, to read its memory")


class Listener(HttpUser):
    def wait_time(self):
        told = self.environment.parsed_options
        return constant_throughput(told.rate / told.num_users)(self) if told.rate else 0.0

    def on_start(self):
        self.voices = [voice["id"] for voice in self.client.get("/v1/audio/voices").json()["voices"]]

    @task
    def listen(self):
        number = next(numbers)
        voice, text = self.voices[number % len(self.voices)], TEXTS[number % len(TEXTS)]
        seed = number // len(self.voices) % SEEDS
        body = {"model": "tts-1", "input": text, "voice": voice, "seed": seed, "response_format": "pcm"}
        leaves = random.random() < self.environment.parsed_options.leave
        with self.client.post("/v1/audio/speech", json=body, stream=True, catch_response=True, timeout=120) as answer:
            if answer.status_code == 429:
                polite = (
                    float(answer.headers["retry-after"]) > 0 and answer.json()["error"]["type"] == "rate_limit_error"
                )
                self.end(answer, "refused", None if polite else "a refusal without a time to come again")
            elif answer.status_code != 200:
                self.end(answer, f"status {answer.status_code}", f"status {answer.status_code}: {answer.text[:200]}")
            elif leaves:
                next(answer.iter_content(1))
                gevent.sleep(random.uniform(0, 1))
                self.end(answer, "left")
            else:
                self.hear(answer, (voice, text, seed))

    def hear(self, answer, key):
        digest, size = hashlib.sha256(), 0
        try:
            for part in answer.iter_content(1 << 14):
                digest.update(part)
                size += len(part)
        except Exception as error:
            self.end(answer, "broken", f"the stream broke off: {type(error).__name__}")
            return
        was = heard.setdefault(key, (digest.hexdigest(), size))
        same = was == (digest.hexdigest(), size)
        outcomes["audio seconds"] += size / 2 / RATE
        self.end(answer, "whole" if same else "other", None if same else f"{size} bytes, {was[1]} before")

    def end(self, answer, outcome, failure=None):
        outcomes[outcome] += 1
        if failure:
            answer.failure(failure)
        else:
            answer.success()


@events.test_start.add_listener
def watch(environment, **_):
    told = environment.parsed_options
    outcomes.clear()
    if told.pid and told.run_time:

        def look():
            for _ in range(10):
                gevent.sleep(0.099 * told.run_time)  # the last one before it ends
                with open(f"/proc/{told.pid}/status") as status:
                    memory.append(next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) // 1024)

        gevent.spawn(look)


@events.test_stop.add_listener
def tell(environment, **_):
    stats = environment.stats.get("/v1/audio/speech", "POST")
    seconds = time.time() - environment.stats.start_time
    result = {
        "seconds": round(seconds, 1),
        **{name: round(value) for name, value in sorted(outcomes.items())},
        "whole_per_second": round(outcomes["whole"] / seconds, 3),
        "begun_per_second": round(stats.num_requests / seconds, 3),
        "memory_mib": memory,
    }
    print(json.dumps(result))
