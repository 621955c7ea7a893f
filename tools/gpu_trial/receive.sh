#!/bin/bash
# In the project's root of a borrowed GPU machine: takes what came with this call, and unpacks each pack that is whole.
# The plans do it themselves; this is for a call that only delivers, where all packs are too much for one.
exec python3 "$(dirname "$0")/unpack.py" "$@"
