"""How long the watcher of uploads pauses, and of what it tells."""

import json
import subprocess
import sys

from embedded.config import REPOSITORY

# In a process of its own: Airflow is much to import, and warns. The clock is what looks take.
_RUN = """
import asyncio, json, sys
sys.path.insert(0, "plugins")
import uploads_trigger
from gun_detection import settings, stages

looks = json.loads(sys.argv[1])
clock, pauses, told, events, coming = [0.0], [], [], [], iter(looks)

def look(settings):
    took, news = next(coming, (0.0, None))
    clock[0] += took
    return news

async def sleep(seconds):
    pauses.append(seconds)
    if len(pauses) > len(looks):
        raise asyncio.CancelledError

async def main():
    asyncio.get_running_loop().time = lambda: clock[0]
    async for event in uploads_trigger.UploadsTrigger(20.0).run():
        events.append(event.payload)

settings.load_settings = lambda: None
stages.look_for_uploads = look
stages.told_of_uploads = lambda settings, news: told.append(news["upto"])
asyncio.sleep = sleep
try:
    asyncio.run(main())
except asyncio.CancelledError:
    print(json.dumps([pauses[:-1], events, told]))
"""


def test_a_long_look_is_followed_by_a_pause_that_ends() -> None:
    news = {"waiting": {"a": 2}, "upto": {"a": 7}, "more": False}
    more = {"waiting": {}, "upto": {}, "more": True}
    looks = [
        (1.0, None, 20.0),
        (1.0, news, 20.0),
        (30.0, None, 150.0),
        (3000.0, None, 300.0),
        (20.0, more, 20.0),
        (60.0, news | {"more": True}, 60.0),
    ]
    ran = subprocess.run(
        [sys.executable, "-c", _RUN, json.dumps([look[:2] for look in looks])],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    pauses, events, told = json.loads(ran.stdout.splitlines()[-1])
    assert pauses == [pause for _, _, pause in looks]
    assert events == [{"a": 2}, {"a": 2}]
    assert told == [{"a": 7}, {}, {"a": 7}]
