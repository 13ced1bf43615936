"""Trials of two workers each: a TorchTrainer in every trial, stopped early, with no dashboard."""

from pathlib import Path

from test_search import search, table

# The known setting goes first; nearly all others hardly move G, so that they are stopped.
SPACE = "optimizer.lr_g: {kind: log, low: 1.0e-9, high: 0.0012}\n"


def test_trainers_that_are_stopped_early_come_to_their_end(
    flags: list[str], tmp_path: Path
) -> None:
    space = tmp_path / "space.yaml"
    space.write_text(SPACE)
    done = search(
        *flags[:2], f"--space={space}", f"--storage={tmp_path}", "--name=w", "--workers=2",
        "--cpus-per-trial=1", "--trials=3", "--epochs=2", "--metric=reconstruction",
        "--sampler=random", "--concurrent=2",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 trials at once, of 2 workers, 0.5 CPU each" in done.stdout
    rows = table(tmp_path / "w")
    assert rows[0]["status"] == "finished"
    assert rows[0]["values"] == {"optimizer.lr_g": 0.001}
    assert {row["status"] for row in rows.values()} == {"finished", "stopped"}
    for number, row in rows.items():
        folder = tmp_path / "w" / "trials" / f"{number:04d}"
        assert len((folder / "metrics.jsonl").read_text().splitlines()) == row["epoch"]
        assert "\nworkers: 2\n" in (folder / "config.yaml").read_text()
        assert row["figures"]["reconstruction"] == row["history"][str(row["epoch"])]
