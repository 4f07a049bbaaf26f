#!/usr/bin/env bash
# On the air-gapped host, from the repository's root: put one transferred part where Python finds it.
#
#   tools/recording/unpack.sh BUNDLE PART     the parts in order; what Python needs is then in $HOST (default: /tmp/host)
set -euo pipefail
part=${1:?usage: unpack.sh BUNDLE PART}/${2:?usage: unpack.sh BUNDLE PART}
host=${HOST:-/tmp/host}; site=$host/site; serve=$host/serve
mkdir -p "$site" "$serve" "$host/model"
install() { python3 -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$@"; }
later() { setsid nohup "$@" > /dev/null 2>&1 < /dev/null & } # goes on while the next part is on its way
case $2 in
1) cp "$part/model.00" "$host/model/" ;;
2) cat "$host/model/model.00" "$part/model.01" > "$host/model/model.whl"
   for wheel in "$host/model/model.whl" "$part"/*.whl; do python3 -m zipfile -e "$wheel" "$site"; done ;;
3) install "$part"/*.whl; later python3 -m compileall -q -j 8 "$site" ;;
4) install "$part"/*.whl; cp -r "$part/llama_cpp" "$site/"
   # GPTQModel compiles an extension at its first use: before anything is timed.
   PYTHONPATH=$site later python3 -c "from gptqmodel.utils.cpp import load_pack_block_extension as load; load()" ;;
5) mkdir -p "$serve/vllm"
   python3 -c "import lzma, shutil, sys; shutil.copyfileobj(lzma.open(sys.argv[1]), open(sys.argv[2], 'wb'))" \
       "$part"/*.xz "$serve/vllm/_C_stable_libtorch.abi3.so" ;;
6) python3 -m tarfile -e "$part/serve.tar.xz" "$serve"; later python3 -m compileall -q -j 8 "$serve"
   mkdir -p .venv-serve/bin
   printf '#!/bin/sh\nexec env PYTHONPATH=%s python3 "$@"\n' "$serve" > .venv-serve/bin/python
   chmod +x .venv-serve/bin/python; touch .venv-serve/.ready ;;
esac
