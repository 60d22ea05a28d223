"""Run the studies of workflows/studies/<paper>/ and keep their tables in benchmarks/results/studies/.

python benchmarks/studies/run.py [<paper>/<study> ...]    # all without a name; what is done is not run again
python benchmarks/studies/run.py --check                  # a line for each table whose code has changed since
"""

import argparse
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from fedpipe import io
from fedpipe.config import Study
from fedpipe.digest import step_digest
from fedpipe.paths import StudyPaths
from fedpipe.report import cells, figures, peaks, peaks_picture, results
from fedpipe.studyfile import load_study

ROOT = Path(__file__).parents[2]
PEAKS = f"The largest phase of what clients of a budget train; {cells.OVER} over the budget."
STUDIES, KEPT = ROOT / "workflows/studies", ROOT / "benchmarks/results/studies"


def code(study: Study) -> str:
    """Digest of the code that a study's table is made by, without the weights that it may begin with."""
    runs = [r.but(model=r.model.model_copy(update={"weights": None})) for r in study.runs()]
    steps = {step_digest(step, run) for run in runs for step in ("measure", "assign", "segment", "evaluate")}
    return io.digest(*sorted(steps), step_digest("table"))


def kept(file: Path) -> Path:
    """Where the table of a study file is kept, without ending."""
    return KEPT / f"{file.parent.name}-{file.stem}"


def run(file: Path) -> None:
    study = load_study(file)
    command = ["snakemake", "--profile", "profiles/local", "--config", f"study={file.relative_to(ROOT)}"]
    subprocess.run(command, cwd=ROOT, check=True)
    table, stem = ROOT / "results" / study.name / "table.parquet", kept(file)
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip()
    made = {"date": datetime.now(UTC).date().isoformat(), "commit": commit, "code": code(study)}
    found, seen = io.read_table(table), io.read_table(table.with_suffix(".obs.parquet"))
    KEPT.mkdir(parents=True, exist_ok=True)
    io.write_table(stem.with_suffix(".parquet"), found, made)
    io.write_table(stem.with_suffix(".obs.parquet"), seen, made)
    shown = cells.present(found, seen)
    head = f"`{file.relative_to(ROOT)}`, {made['date']}, commit {commit}, {platform.machine()}, {os.cpu_count()} cores."
    text = f"{head}\n\n{cells.markdown(shown, ' '.join([*io.read_meta(table)['remarks'], cells.note(shown)]))}"
    if study.measure == "all":
        rows = peaks.largest(results.load_all(study, [p.folder for p in StudyPaths(table.parent, study).runs]))
        text += f"\n{cells.markdown(peaks.by_budget(rows), PEAKS)}"
        stem.with_suffix(".svg").write_bytes(figures.drawn(peaks_picture.draw(rows), "svg"))
    stem.with_suffix(".md").write_text(text)
    print(f"{stem.relative_to(ROOT)}.md")


def check(file: Path) -> None:
    table = kept(file).with_suffix(".parquet")
    if not table.is_file():
        print(f"note: {file.relative_to(ROOT)} has no kept table; make studies makes it")
    elif io.read_meta(table)["code"] != code(load_study(file)):
        print(f"note: {table.relative_to(ROOT)}: its code has changed since commit {io.read_meta(table)['commit']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", metavar="<paper>/<study>")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    files = [STUDIES / f"{name}.yaml" for name in args.studies] or sorted(STUDIES.glob("*/*.yaml"))
    if absent := [f for f in files if not f.is_file()]:
        sys.exit(f"no study {absent[0].relative_to(ROOT)}")
    for file in files:
        (check if args.check else run)(file)


if __name__ == "__main__":
    main()
