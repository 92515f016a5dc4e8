#!/bin/sh
# Installs this folder on a machine that has Python and torch and no network.
set -eu

usage() {
    cat <<'TEXT'
usage: install.sh [--venv DIR | --target DIR] [--python PYTHON] [--overwrite]

Installs flash-fine-tuning from this folder, without a network. Taken from the machine: Python, torch with what it
needs, and every package that is there and in range. What is missing comes from this folder.

  --venv DIR       an environment that sees the machine's packages (./fft-venv)
  --target DIR     a folder for PYTHONPATH instead
  --python PYTHON  the machine's Python that has torch (python3)
  --overwrite      replace what this script installed there before

Exit codes: 0 installed, 1 failed while installing, 2 refused, with nothing changed.
TEXT
}

refuse() {
    echo "error: $*" >&2
    exit 2
}

bundle=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
kind=venv destination=./fft-venv python=python3 overwrite=
while [ $# -gt 0 ]; do
    case $1 in
    -h | --help) usage && exit 0 ;;
    --overwrite) overwrite=yes && shift && continue ;;
    --venv | --target | --python) [ $# -gt 1 ] || refuse "$1 needs a value; install.sh --help lists the flags." ;;
    *) refuse "$1 is no flag of install.sh; install.sh --help lists them." ;;
    esac
    case $1 in
    --python) python=$2 ;;
    *) kind=${1#--} destination=$2 ;;
    esac
    shift 2
done

# Nothing of the caller's may steer pip, or lend packages that are not there when we train.
unset PYTHONPATH PYTHONHOME
export PIP_CONFIG_FILE=/dev/null PYTHONDONTWRITEBYTECODE=1

(cd "$bundle" && sha256sum -c SHA256SUMS >/dev/null 2>&1) ||
    refuse "files of $bundle are damaged or missing (sha256sum -c SHA256SUMS says which): copy the folder again."
command -v "$python" >/dev/null || refuse "$python was not found: name the Python that has torch with --python."
here=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || refuse "$python does not run."
wanted=$(sed -n 's/^python=//p' "$bundle/target")
[ "$here" = "$wanted" ] ||
    refuse "$python is Python $here, the bundle is for $wanted: name another with --python, or make one for $here."
if [ -e "$destination" ]; then
    [ -n "$overwrite" ] || refuse "$destination exists: add --overwrite, or name another folder with --$kind."
    [ -e "$destination/.made-by-fft-bundle" ] ||
        refuse "$destination was not made by install.sh: remove it yourself, or name another folder."
fi

echo "looking at $(command -v "$python")" >&2
wheels=$("$python" "$bundle/resolve.py") || exit $?

rm -rf "$destination"
trap 'code=$?; [ $code -eq 0 ] || { rm -rf "$destination"; echo "error: nothing was installed." >&2; }' EXIT
trap 'exit 1' HUP INT TERM
mkdir -p "$destination"
destination=$(CDPATH='' cd -- "$destination" && pwd)
mark=$destination/.made-by-fft-bundle
pip=$(echo "$bundle"/wheels/pip-*.whl)/pip
runner=$python into=$destination
if [ "$kind" = venv ]; then
    "$python" "$bundle/resolve.py" --venv "$destination" || exit 1
    runner=$destination/bin/python into=
fi
echo "installing $(echo "$wheels" | wc -l) wheels into $destination" >&2
# Python compiles what it imports when it first does: all at once takes longer than all the rest.
echo "$wheels" >"$mark"
"$runner" "$pip" install --isolated --quiet --no-index --no-deps --no-compile --no-cache-dir \
    --disable-pip-version-check ${into:+--target "$into"} --requirement "$mark" >&2 || exit 1

case $kind in
venv) echo "installed; go on with: . '$destination/bin/activate' && python -m fft.train --help" >&2 ;;
*) echo "installed; go on with: export PYTHONPATH='$destination' PATH='$destination/bin':\"\$PATH\"" >&2 ;;
esac
