# Set-up, sourced by every recipe: `source runs/setup.sh` from anywhere inside the project.
#
# Makes .venv in the project's root with uv (fetched with pip where it is missing), picks the extra by looking for a GPU,
# keeps a NANOCHAT_BASE_DIR that is already set, and stops at the first error. SKIP_SETUP=1 leaves the environment alone.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"
mkdir -p "$NANOCHAT_BASE_DIR"

if [ -z "${SKIP_SETUP:-}" ]; then
    if command -v uv >/dev/null; then
        uv=uv
    else
        uv="$root/.venv-uv/bin/uv"
        [ -x "$uv" ] || { python3 -m venv .venv-uv && .venv-uv/bin/python -m pip install -q uv; }
    fi
    # A folder of wheels that pip is told about (say, a CPU build of torch) serves uv too.
    links="${PIP_FIND_LINKS:-$(python3 -m pip config get global.find-links 2>/dev/null || true)}"
    if [ -n "$links" ]; then export UV_FIND_LINKS="${UV_FIND_LINKS:-${links// /,}}"; fi
    # no pipe into grep -q: it leaves at the first line, and nvidia-smi, which has more to say, is then called failed
    case "$(nvidia-smi -L 2>/dev/null || true)" in *GPU*) extra=gpu ;; *) extra=cpu ;; esac
    "$uv" sync --quiet --extra "$extra"
fi
export PATH="$root/.venv/bin:$PATH"
