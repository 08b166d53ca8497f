"""The page of a report in a real browser: seen in light and dark, and not a word on its console."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.compare.sides import Side

page = pytest.importorskip("bench.report.page", reason="the plot extra is not installed").page
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
]


@pytest.fixture
def browse(tmp_path: Path) -> Callable[..., str]:
    """Opens a page in Chromium; gives what it logged."""
    if CHROMIUM is None:
        pytest.skip("no chromium here: apt-get install chromium")

    def browse(file: Path, *more: str) -> str:
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        ended = subprocess.run(
            [CHROMIUM, *QUIET, profile, *more, file.as_uri()], capture_output=True, text=True, timeout=120, check=True
        )
        return ended.stderr

    return browse


def test_a_browser_shows_the_page_without_a_word_on_its_console(
    browse: Callable[..., str], swept: list[Side], tmp_path: Path
) -> None:
    (tmp_path / "r.html").write_text(page(swept), encoding="utf-8")
    shots = [tmp_path / f"{scheme}.png" for scheme in ("light", "dark")]
    for scheme, shot in enumerate(shots):
        logged = browse(
            tmp_path / "r.html",
            f"--screenshot={shot}",
            "--window-size=1200,1600",
            f"--blink-settings=preferredColorScheme={1 - scheme}",
        )
        assert "CONSOLE" not in logged
    light, dark = (mean_brightness(shot) for shot in shots)
    assert light > 0.8
    assert dark < 0.3


def test_the_browsers_console_is_listened_to(browse: Callable[..., str], tmp_path: Path) -> None:
    """Were it not, the test above could not fail: a page that breaks its own policy does speak there."""
    policy = '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'">'
    (tmp_path / "bad.html").write_text(f"<!doctype html><head>{policy}</head><body><script>1</script>")
    assert "CONSOLE" in browse(tmp_path / "bad.html", f"--screenshot={tmp_path / 'bad.png'}")


def mean_brightness(png: Path) -> float:
    image = pytest.importorskip("matplotlib.image", reason="the plot extra is not installed")
    return float(image.imread(png)[..., :3].mean())
