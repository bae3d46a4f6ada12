"""Everything that a GPU has to show, in one command: `python -m bench.gpu [--out FILE]`, from the source tree.

Builds the package with its CUDA kernels if they are not there, runs the kernels' tests, `pgdfast verify --device cuda`, the
parts of bench/gpu_parts.py and compute-sanitizer; each in a process of its own with a time limit, eight minutes in all. A part
that fails is recorded with its message, and the rest go on. Writes one JSON file with the card, versions, date and figures.
`--dry-run` does the same at tiny sizes on the CPU, to try the script itself.
"""

import argparse
import datetime
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOTAL = 480.0   # seconds for all parts
NVCC = (
    "nvcc -std=c++20 -O3 -shared -Xcompiler -fPIC -gencode arch=compute_80,code=sm_80 "
    "-gencode arch=compute_90,code=[sm_90,compute_90] '-DPGDFAST_CUDA_ARCHITECTURES=\"sm_80, sm_90 and PTX by nvcc alone\"' "
    "-o pgdfast/_cuda.so csrc/cuda/*.cu csrc/cuda/*.cpp csrc/plan/plan.cpp csrc/plan/cut.cpp -ldl"
)
MEASURED = {"check": 60, "steps": 60, "ensemble": 60, "gram": 60, "products": 40, "cg": 60}   # limits in seconds


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="the JSON file (default: bench/results/gpu-CARD-DATE.json)")
    parser.add_argument("--dry-run", action="store_true",
                        help="tiny sizes on the CPU; nothing is built, and the file goes to the folder for temporary ones")
    parser.add_argument("--part", choices=MEASURED, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    device = "cpu" if arguments.dry_run else "cuda"
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        print("bench.gpu: PyTorch sees no GPU on this machine; run it where there is one, or with --dry-run", file=sys.stderr)
        return 2
    if arguments.part:
        from . import gpu_parts

        arguments.out.write_text(json.dumps(gpu_parts.PARTS[arguments.part](device, arguments.dry_run)), encoding="utf-8")
        return 0
    found = record(device)
    results = Path(tempfile.gettempdir()) if arguments.dry_run else ROOT / "bench/results"
    target = arguments.out or results / f"gpu-{found['card']}-{found['date'][:10]}.json".replace(" ", "-")
    target.parent.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + TOTAL
    with tempfile.TemporaryDirectory() as folder:
        for name, command, limit in plan(device, Path(folder)):
            left = end - time.monotonic()
            print(f"{name} ...", end=" ", flush=True)
            result = {"status": "left out: no time was left"} if left < 5 else run(command, min(limit, left))
            if name == "build" and result["status"] == "done":
                found |= record(device)
            written = Path(folder) / f"{name}.json"
            if written.exists():
                result["figures"] = json.loads(written.read_text(encoding="utf-8"))
            found["parts"][name] = result
            print(result["status"], flush=True)
            target.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")   # what is known, should the rest not end
    print(f"written: {target}")
    return int(any(part["status"] != "done" for part in found["parts"].values()))


def record(device):
    """The card, versions and date."""
    import torch

    card = torch.cuda.get_device_name() if device == "cuda" else "dry run on the CPU"
    info = subprocess.run([sys.executable, "-c", "import json, pgdfast; print(json.dumps(pgdfast.build_info()))"],
                          capture_output=True, text=True, env=environment())
    return {
        "card": card, "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda},
        "build": json.loads(info.stdout) if info.returncode == 0 else info.stderr[-500:], "parts": {},
    }


def plan(device, folder):
    """(name, command, limit) of every part."""
    dry = ["--dry-run"] if device == "cpu" else []
    parts = []
    if device == "cuda" and not (ROOT / "pgdfast/_cuda.so").exists():
        # Without a network pip may lack CMake; nvcc alone can make the kernels, which see no framework.
        pip = f"{shlex.quote(sys.executable)} -m pip install -q --no-build-isolation --no-deps -e ."
        parts.append(("build", ["bash", "-c", f"{pip} || {NVCC}"], 240))
    tests = ["tests/cuda/test_cuda_schedule.py"] if dry else ["tests/cuda"]
    parts.append(("tests", [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests], 120))
    tasks = ["modular-mlp"] if dry else []
    parts.append(("verify", [sys.executable, "-m", "pgdfast", "verify", "--device", device, *tasks], 120))

    def measured(name, into):
        return [sys.executable, "-m", "bench.gpu", "--part", name, "--out", str(folder / f"{into}.json"), *dry]

    parts += [(name, measured(name, name), limit) for name, limit in MEASURED.items()]
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    for tool in ("memcheck", "racecheck") if device == "cuda" else ():
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *measured("check", tool)]
        parts.append((tool, command, 120))
    return parts


def environment():
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "PGDFAST_CUDA": "ON"}


def run(command, limit):
    """{status, seconds, and where it did not end well its last words} of a process, ended with its children at the limit."""
    start = time.monotonic()
    try:
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   text=True, start_new_session=True)
    except OSError as error:
        return {"status": f"failed: {error}", "seconds": 0.0}
    try:
        words, _ = process.communicate(timeout=limit)
        status = "done" if process.returncode == 0 else f"failed: exit code {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        words, _ = process.communicate()
        status = f"failed: not done within {limit:.0f} seconds"
    result = {"status": status, "seconds": round(time.monotonic() - start, 1)}
    if status != "done":
        result["message"] = words[-2000:]
    return result


if __name__ == "__main__":
    sys.exit(main())
