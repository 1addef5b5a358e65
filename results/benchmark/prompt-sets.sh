#!/usr/bin/env bash
# Write the rows of a published prompt set for `whiflash bench --prompts`. Needs jq; downloads nothing.
# prompt-sets.sh SET FOLDER > rows.jsonl: FOLDER has the set's files, which docs/dev/bench.md names.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
set=$1 folder=$2
reason='\nPlease reason step by step, and put your final answer within \\boxed{}.'
code='Write a solution to the following problem and make sure that it passes the tests:\n```python\n'

# Rows with `turns`, or with the fields of a question. Arguments: the question in jq, files.
rows() {
  local asks=$1 file
  shift
  for file in "$@"; do
    jq -nc --arg set "$set" --arg file "$(basename "$file" .jsonl)" "[inputs] | to_entries[] | (.key + 1) as \$row | .value
      | {id: \"\(\$file)-\(\$row)\", category: \$set, turns: (.turns // [$asks])}" "$file"
  done
}

case $set in
  spec-bench)
    jq -c '.category |= if IN("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
      then "multi-turn" else . end' "$folder"/question.jsonl ;;
  gsm8k) rows ".question + \"$reason\"" "$folder"/gsm8k.jsonl ;;
  math500) rows ".problem + \"$reason\"" "$folder"/math500.jsonl ;;
  aime) rows ".problem + \"$reason\"" "$folder"/aime2*.jsonl ;;
  humaneval) rows "\"$code\" + .prompt + \"\n\`\`\`\"" "$folder"/humaneval.jsonl ;;
  lbpp) rows .instruction "$folder"/lbpp.jsonl ;;
  mbpp | arena-hard-v2 | livecodebench | mt-bench) rows .prompt "$folder/$set".jsonl ;;
  ifeval) rows .prompt "$folder"/input_data.jsonl ;;
  bfcl)
    for file in "$folder"/BFCL_v4_{simple_*,multiple,parallel*,live_simple,live_multiple,live_parallel*,multi_turn_base,multi_turn_miss_param}.json; do
      jq -c --slurpfile docs <(jq -c '{file: (input_filename | split("/")[-1] | rtrimstr(".json")), of: .}' \
        "$folder"/multi_turn_func_doc/*.json) -f "$here"/bfcl.jq "$file"
    done ;;
  swe-agent) # the messages before the middle answer
    find "$folder" -name '*.traj' -print0 | sort -z | xargs -0 jq -c '[.history[] | {role, content} + ({tool_calls,
        tool_call_id: (.tool_call_id // .tool_call_ids[0]?), reasoning_content} | with_entries(select(.value != null)))] as $all
      | [$all | to_entries[] | select(.value.role == "assistant" and .key > 0).key] as $answers | select($answers != [])
      | {id: input_filename, category: "SWE-agent", messages: $all[:$answers[$answers | length / 2 | floor]]}' ;;
  *) echo "$set is no set that docs/dev/bench.md lists" >&2; exit 2 ;;
esac
