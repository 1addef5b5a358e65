# Rows of BFCL v4 as prompts: functions as tools with the types of JSON schema. $docs: the functions of multi-turn rows, with their files.
def types: {dict: "object", HashMap: "object", Hashtable: "object", array: "array", list: "array", tuple: "array",
  ArrayList: "array", Array: "array", Queue: "array", Stack: "array", integer: "integer", byte: "integer", short: "integer",
  long: "integer", number: "number", float: "number", double: "number", boolean: "boolean", bool: "boolean", object: "object"};
def typed: walk(if type == "object" and (.type | type) == "string" then .type |= (types[.] // "string") else . end);
def files: {GorillaFileSystem: "gorilla_file_system", MathAPI: "math_api", MessageAPI: "message_api",
  TicketAPI: "ticket_api", TradingBot: "trading_bot", TravelAPI: "travel_booking", TwitterAPI: "posting_api",
  VehicleControlAPI: "vehicle_control"};
([.question[] | select(. != [])]) as $turns
| (.excluded_function // []) as $hidden
| [.function[]?, ((.involved_classes // [])[] as $class | $docs[] | select(.file == files[$class]) | .of
    | select(.name | IN($hidden[]) | not))] as $functions
| {id, category: (.id | sub("_[^_]*$"; "")), messages: $turns[0],
   turns: [$turns[1:][] | map(.content) | join("\n")],
   tools: [$functions[] | {type: "function", function: ({name: (.name | gsub("\\."; "_"))} + ({description, parameters} | typed))}],
   tool_choice: "required"}
