#!/usr/bin/env bash
# open_issue.sh TITLE FILE: an issue with the end of a log, unless one of that title is open.
set -euo pipefail
if [ "$(gh issue list --search "$1 in:title" --json number --jq length)" = 0 ]; then
  tail -c 60000 "$2" | gh issue create --title "$1" --body-file -
fi
