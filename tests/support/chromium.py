"""A real browser, where there is one."""

import shutil
import subprocess

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SWITCHES = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--v=0",
]


def opened(page, profile, *switches):
    """The document as it is after its scripts ran, and what the browser said of it on its console.

    ``page`` is a path, ``profile`` a folder for the browser's own files.
    """
    done = subprocess.run(
        [CHROMIUM, *SWITCHES, f"--user-data-dir={profile}", *switches, "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
