"""A small profile folder as the ten stages would leave it: real formats, rendered scenes, invented numbers."""

import hashlib
import json
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image

from mip.config import METHODS, Paths
from mip.tables import Row, rejected, write_json, write_table
from mip.toybox.scenes import PLACES, Identity, draw_scene, identities, render

COMBINATIONS, PROMPTS = 6, 2
_PAIRS = (("ball", "star"), ("cup", "house"), ("fish", "car"), ("heart", "tree"), ("star", "fish"), ("house", "ball"))
_CONFUSION = {"base": 0.95, "ip_adapter_concat": 0.8, "ip_adapter_mean": 0.75, "training_free": 0.5, "mip": 0.3}


def write_profile(root: Path, *, prompt_suffix: str = "") -> Paths:
    """Write every input of the report under `root`; `prompt_suffix` ends every prompt."""
    paths = Paths("toybox", root)
    tasks = _tasks(root, paths, prompt_suffix)
    _images(paths, tasks)
    _judged(paths, tasks)
    _samples(paths)
    _training(paths)
    write_json(paths.timings / "ingest.json", {"wall_s": 14.2, "cpu_s": 25.1, "rows": 1600})
    write_json(paths.timings / "generate@mip.json", {"wall_s": 66.0, "cpu_s": 118.9, "rows": 120})
    write_json(paths.timings / "train.json", {"wall_s": 141.7, "cpu_s": 260.3, "rows": 300})
    return paths


def _tasks(root: Path, paths: Paths, suffix: str) -> list[Row]:
    pool = identities("benchmark")
    tasks = []
    for number, names in enumerate(_PAIRS):
        references = []
        for place, name in enumerate(names):
            file = Path("data/toybox/index/source") / f"toy_{name}{number}" / "0.png"
            identity = pool[(7 * number + 23 * place) % len(pool)]
            _draw(root / file, [name], [identity], seed=place, background="wall", size=128)
            references.append(
                {"name": name, "concept": f"toy_{name}{number}", "images": [file.as_posix()], "boxes": [[]]}
            )
        for prompt in range(PROMPTS):
            background = list(PLACES)[(number + prompt) % len(PLACES)]
            tasks.append(
                {
                    "task_id": f"{number:03d}-{prompt:02d}",
                    "combination": number,
                    "prompt_number": prompt,
                    "prompt": f"a {names[0]} and a {names[1]} {PLACES[background]}{suffix}",
                    "caption": None,
                    "category": "toy+pet" if number % 3 == 2 else "toy+toy",
                    "seed": 420 + number,
                    "references": references,
                }
            )
    write_table(paths.index / "tasks.parquet", "tasks", tasks, {})
    write_table(paths.index / "part-0.parquet", "index", [{"image_id": f"sa_{n}"} for n in range(60)], {})
    broken = [rejected("image", f"sa_{n}", "broken_image", "image file is truncated") for n in (60, 61)]
    write_table(paths.index / "rejected.parquet", "rejected", broken, {})
    return tasks


def _images(paths: Paths, tasks: list[Row]) -> None:
    pool = identities("benchmark")
    for method in METHODS:
        rows = []
        for n, task in enumerate(tasks):
            names = [reference["name"] for reference in task["references"]]
            right = [pool[(7 * task["combination"] + 23 * place) % len(pool)] for place in range(2)]
            file = paths.images / method / f"{task['task_id']}.png"
            _draw(file, names, _worn(method, right, n), seed=n, background=_background(task), size=64)
            sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
            scale = None if method == "base" else 0.8
            rows.append(
                {
                    "task_id": task["task_id"],
                    "method": method,
                    "path": file.name,
                    "sha256": sha256,
                    "seed": n,
                    "scale": scale,
                }
            )
        write_table(paths.images / method / "images.parquet", "images", rows, {})
        tried = [(0.6, 0.62, 0.71), (0.8, 0.41, 0.73), (1.0, 0.47, 0.72)] if method != "base" else []
        candidates = [{"scale": s, "confused": c, "confused_error": 0.1, "clip_t": t, "tasks": 16} for s, c, t in tried]
        rule = "lowest confused" if tried else "a method without references has no scale"
        choice = {"method": method, "scale": 0.8 if tried else None, "rule": rule, "candidates": candidates}
        write_json(paths.images / method / "scale.json", choice)
    for method, slope in (("training_free", 0.6), ("mip", 1.0)):
        for task in tasks[:2]:
            left = np.tile(np.linspace(0.5 + slope / 2, 0.5 - slope / 2, 16, dtype=np.float32), (16, 1))
            path = paths.images / method / "maps" / f"{task['task_id']}.npz"
            path.parent.mkdir(exist_ok=True)
            np.savez(path, relevance_NHW=np.stack([left, 1 - left]), names=[r["name"] for r in task["references"]])


def _background(task: Row) -> str:
    return next(name for name, words in PLACES.items() if words in task["prompt"])


def _worn(method: str, right: list[Identity], number: int) -> list[Identity]:
    """Text only invents looks, IP-Adapter gives both objects one look, the merge is mostly right."""
    if method == "base":
        pool = identities("train")
        return [pool[(31 * number) % len(pool)], pool[(57 * number + 5) % len(pool)]]
    if method.startswith("ip_adapter"):
        return [right[0], right[0]] if method == "ip_adapter_concat" else [right[1], right[1]]
    return right[::-1] if method == "training_free" and number % 3 == 0 else right


def _draw(path: Path, names: list[str], worn: list[Identity], *, seed: int, background: str, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scene = draw_scene(np.random.default_rng(seed), names, worn, background=background)
    Image.fromarray(render(scene, width=size, height=size).image).save(path)


def _judged(paths: Paths, tasks: list[Row]) -> None:
    rng = np.random.default_rng(0)
    rows, by_combination, methods = [], [], {}
    for method in METHODS:
        summary = {}
        for metric, mean, width in _summary(method):
            summary[metric] = {
                "value": mean,
                "low": max(mean - width, 0),
                "high": min(mean + width, 1),
                "n": len(tasks),
            }
            by_combination += [
                {
                    "method": method,
                    "combination": c,
                    "category": "toy+toy",
                    "metric": metric,
                    "value": mean + 0.01 * c,
                    "n": PROMPTS,
                }
                for c in range(COMBINATIONS)
            ]
        summary["localisation"] = {"value": None, "low": None, "high": None, "n": 0}
        if method == "mip":
            summary["localisation"] = {"value": 0.81, "low": 0.76, "high": 0.85, "n": 2}
        methods[method] = summary
        for n, task in enumerate(tasks):
            leaked = bool(rng.random() < _CONFUSION[method])
            rows.append(_verdict(method, task, leaked=leaked, missing=n == 5))
    write_table(paths.reports / "per_task.parquet", "per_task", rows, {})
    write_table(paths.reports / "per_combination.parquet", "per_combination", by_combination, {})
    write_json(
        paths.metrics,
        {
            "schema_version": 1,
            "benchmark": "toybox",
            "variant": "official",
            "tasks": len(tasks),
            "combinations": COMBINATIONS,
            "seed": 420,
            "methods": methods,
            "provenance": {
                "git": "0123abc+",
                "params": "f00d" * 8,
                "inputs": {"data/toybox/images/mip": "ab" * 32},
                "packages": {"torch": "2.14.1", "diffusers": "0.42.1"},
                "device": "cpu",
                "judge": {"leak_threshold": 0.123, "errors": {"right": 0.05}, "same_class_tasks": 0},
            },
        },
    )


def _summary(method: str) -> list[tuple[str, float, float]]:
    confused = _CONFUSION[method]
    return [
        ("clip_t", 0.71 + 0.05 * (1 - confused), 0.02),
        ("clip_i", 0.64 + 0.08 * (1 - confused), 0.02),
        ("dino", 0.35 + 0.1 * (1 - confused), 0.03),
        ("presence", 0.9 - 0.1 * confused, 0.04),
        ("swap_rate", 0.2 * confused, 0.03),
        ("leak", 0.12 * confused, 0.02),
        ("confused", confused, 0.08),
        ("confused_present", confused - 0.05, 0.09),
        ("count_error", 0.1, 0.05),
    ]


def _verdict(method: str, task: Row, *, leaked: bool, missing: bool) -> Row:
    return {
        "method": method,
        "task_id": task["task_id"],
        "combination": task["combination"],
        "clip_t": 0.7,
        "clip_i": 0.6,
        "dino": 0.4,
        "presence": 0.5 if missing else 1.0,
        "swapped": False,
        "leak": 0.2 if leaked else 0.02,
        "leaked": leaked,
        "confused": leaked or missing,
        "count_error": 0.0,
        "detect_and_compare": 0.0 if missing else 0.4 if leaked else 0.9,
        "identity_margin": 0.1 if missing else 0.2 if leaked else 0.6 + 0.01 * task["combination"],
        "similarity": [[0.5, 0.8] if leaked else [0.9, 0.2], [None, None] if missing else [0.3, 0.7]],
    }


def _samples(paths: Paths) -> None:
    rng = np.random.default_rng(1)
    scored = [{"sample_id": f"s{n}", "score": float(score)} for n, score in enumerate(rng.normal(0.2, 0.1, 50))]
    best = sorted(scored, key=lambda row: -row["score"])[:30]
    write_table(paths.samples / "part-0.parquet", "samples", [{"sample_id": row["sample_id"]} for row in scored], {})
    write_table(paths.scores / "part-0.parquet", "scores", scored, {})
    write_table(paths.manifest / "train.parquet", "manifest", best[:27], {})
    write_table(paths.manifest / "val.parquet", "manifest", best[27:], {})
    kept = {row["sample_id"] for row in best}
    lost = [rejected("sample", row["sample_id"], "below_rank") for row in scored if row["sample_id"] not in kept]
    write_table(paths.manifest / "rejected.parquet", "rejected", lost, {})
    write_table(
        paths.masks / "rejected.parquet", "rejected", [rejected("object", "sa_3/7", "too_small", "area 5 < 8")], {}
    )
    few = [rejected("sample", f"sa_{n}", "too_few_objects") for n in range(50, 60)]
    write_table(paths.samples / "rejected.parquet", "rejected", few, {})
    write_table(paths.scores / "rejected.parquet", "rejected", [], {})
    steps = [
        {"stage": "ingest", "unit": "image", "came": 62, "kept": 60, "rejected": {"broken_image": 2}},
        {"stage": "construct", "unit": "image", "came": 60, "kept": 50, "rejected": {"too_few_objects": 10}},
        {"stage": "manifest", "unit": "sample", "came": 50, "kept": 30, "rejected": {"below_rank": 20}},
    ]
    funnel = {"schema_version": 1, "train": 27, "validation": 3, "stages": steps, "others": []}
    write_json(paths.manifest / "funnel.json", funnel)
    for name in ("accepted", "rejected"):
        _sheet(paths.manifest / f"{name}.png")


def _sheet(path: Path) -> None:
    sheet = Image.new("RGB", (8 * 66, 3 * 66), "white")
    pool = identities("train")
    for n, pair in enumerate(list(combinations(("ball", "star", "cup", "fish", "car", "tree", "house"), 2))[:24]):
        scene = draw_scene(np.random.default_rng(n), list(pair), [pool[n], pool[-n - 1]])
        sheet.paste(Image.fromarray(render(scene, width=64, height=64).image), ((n % 8) * 66, (n // 8) * 66))
    sheet.save(path)


def _training(paths: Paths) -> None:
    rng = np.random.default_rng(2)
    rows = []
    for step in range(1, 301):
        loss = 0.22 + 0.2 * np.exp(-step / 60) + rng.normal(0, 0.02)
        validation = 0.23 + 0.2 * np.exp(-step / 60) if step % 100 == 0 else None
        rows.append(
            {
                "step": step,
                "loss": float(loss),
                "validation_loss": validation,
                "learning_rate": 1e-3,
                "samples": 16 * step,
            }
        )
    write_table(paths.adapter / "curve.parquet", "curve", rows, {})


def rewrite_json(path: Path, **changes: object) -> None:
    """Change keys of a JSON object in place."""
    write_json(path, {**json.loads(path.read_text()), **changes})
