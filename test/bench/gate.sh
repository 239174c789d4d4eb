#!/bin/sh
# Fails when one KMS v2 Encrypt takes more instructions than it did when LIMIT was set.
#
#     gate.sh PROGRAM        the release build: build/static/kmsplugin
#
# The count is exact (see instructions.sh), but a matter of compiler and libraries too:
# after a change of those, or a gain to keep, LIMIT is set to the number shown.
set -eu
LIMIT=12000             # instructions
TOLERANCE=3             # percent over it

per_request=$("$(dirname "$0")/instructions.sh" "$1" 8 32) || { echo '0 passed, 1 failed'; exit 1; }
allowed=$((LIMIT * (100 + TOLERANCE) / 100))
echo "Encrypt, 8 connections x 32 streams: $per_request instructions a request, limit $LIMIT + $TOLERANCE % = $allowed"
if [ "$per_request" -le "$allowed" ]; then
    echo '1 passed, 0 failed'
else
    echo '0 passed, 1 failed'
    exit 1
fi
