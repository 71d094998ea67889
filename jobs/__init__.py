"""Entry points: `python -m jobs.NAME`.

Ray reads these settings when it is first imported, so they are made here, before any job's own imports.
"""

import os

os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # else workers under `uv run` build a new environment
os.environ.setdefault("RAY_AUTH_MODE", "token")  # clusters ask for the token in ~/.ray/auth_token
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # one progress line per step, not one per checkpoint file
