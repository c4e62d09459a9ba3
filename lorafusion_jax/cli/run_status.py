"""How far a run is, as plain values, from nothing but its files."""

import fcntl
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorafusion_jax.train.run_folder import RunFolder


def run_status(folder: "RunFolder", now: float) -> dict[str, Any]:
    """Returns the state of a run and of its jobs.

    Args:
        folder: of a run that is under way, was interrupted, or has ended.
        now: seconds since 1970.

    Returns:
        state ("running", "ended" or "interrupted"), microbatch and microbatches, tokens_per_s and
        eta_s of this process's part of the run, seconds_since_event, last_event, and jobs by name:
        status, step, steps, loss, tokens_per_s, and base, best and last held-out loss with the
        step of the last. What is not known is None.
    """
    events = folder.events()
    metrics = {name: folder.metrics(name) for name in folder.jobs}
    planned = [event for event in events if event["event"] == "RunPlanned"]
    since = planned[-1]["time"] if planned else 0.0
    recent = sorted(
        (m["time"], m["microbatch"])
        for lines in metrics.values()
        for m in lines
        if m.get("loss") is not None and m["time"] >= since
    )
    last = events[-1] if events else None
    ended = last is not None and last["event"] == "RunEnded"
    state = "ended" if ended else "running" if is_locked(folder.path) else "interrupted"
    live = folder.live()
    if live.get("time", 0.0) < since:  # of the process before, and nothing has happened yet
        live = {}
    total = _planned_microbatches(folder)
    done = max((index + 1 for _, index in recent), default=planned[-1]["start"] if planned else 0)
    per_microbatch = None
    if len(recent) > 1 and recent[-1][1] > recent[0][1]:
        per_microbatch = (recent[-1][0] - recent[0][0]) / (recent[-1][1] - recent[0][1])
    jobs = {name: _job(name, lines, events, since) for name, lines in metrics.items()}
    rates = [job["tokens_per_s"] for job in jobs.values() if job["tokens_per_s"] is not None]
    rate, at = sum(rates) if rates else None, recent[-1][0] if recent else now
    if live and live["microbatch"] >= done:
        done, at = live["microbatch"], live["time"]
        seconds, count = at - live["since"]["time"], done - live["since"]["microbatch"]
        if seconds > 0 and count > 0:
            per_microbatch, rate = seconds / count, live["tokens"] / seconds
        for name, found in live["jobs"].items():
            if name in jobs:
                _update(jobs[name], found)
    eta = None
    if state == "running" and total is not None and per_microbatch is not None:
        eta = max(0.0, per_microbatch * (total - done) - (now - at))
    return {
        "run": str(folder.path),
        "state": state,
        "microbatch": total if ended and total is not None else done,
        "microbatches": total,
        "tokens_per_s": rate,
        "eta_s": eta,
        "seconds_since_event": None if last is None else max(0.0, now - last["time"]),
        "last_event": None if last is None else last["event"],
        "seconds": last["seconds"] if last is not None and ended else None,
        "jobs": jobs,
    }


def _update(job: dict[str, Any], live: dict[str, Any]) -> None:
    """Brings a job up to the last step that status.json knows."""
    if live["step"] > job["step"] or job["status"] in ("training", "waiting"):
        job["step"] = max(job["step"], live["step"])
        job["loss"] = live["loss"]
        job["status"] = "training" if job["status"] == "waiting" else job["status"]
    if live["tokens_per_s"] is not None:
        job["tokens_per_s"] = live["tokens_per_s"]


def is_locked(path: Path) -> bool:
    """Says whether a process trains in a run folder now; changes nothing."""
    try:
        with open(path / ".lock", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _planned_microbatches(folder: "RunFolder") -> int | None:
    path = folder.path / "plan.json"
    if not path.is_file():
        return None
    microbatches = json.loads(path.read_text(encoding="utf-8")).get("microbatches")
    return len(microbatches) if isinstance(microbatches, list) else None


def _job(
    name: str, lines: list[dict[str, Any]], events: list[dict[str, Any]], since: float
) -> dict[str, Any]:
    steps = [m for m in lines if m.get("loss") is not None]
    evals = [m for m in lines if m.get("eval_loss") is not None]
    trained = [m for m in evals if m["step"]]
    found: dict[str, Any] = {
        "status": "training" if steps else "waiting",
        "step": steps[-1]["step"] if steps else 0,
        "steps": None,
        "loss": steps[-1]["loss"] if steps else None,
        "tokens_per_s": None,
        "base_loss": next((m["eval_loss"] for m in evals if not m["step"]), None),
        "best_loss": min((m["eval_loss"] for m in trained), default=None),
        "eval_loss": trained[-1]["eval_loss"] if trained else None,
        "eval_step": trained[-1]["step"] if trained else None,
    }
    for event in events:
        if event["event"] == "RunPlanned":
            planned = (job["steps"] for job in event["jobs"] if job["name"] == name)
            found["steps"] = next(planned, found["steps"])
        elif event["event"] == "JobEnded" and event["job"] == name:
            found["status"], found["step"] = event["status"], event["step"]
    recent = [m for m in steps if m["time"] >= since] or steps
    if len(recent) > 1 and recent[-1]["time"] > recent[0]["time"]:
        tokens = recent[-1]["tokens"] - recent[0]["tokens"]
        found["tokens_per_s"] = tokens / (recent[-1]["time"] - recent[0]["time"])
    return found
