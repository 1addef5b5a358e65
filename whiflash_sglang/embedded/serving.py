"""How the embedded target is served."""

from whiflash_sglang.embedded import TARGET_NAME, ensure_target

COMPACT_JSON = "--constrained-json-disable-any-whitespace"
STRICT_TOOLS = {"SGLANG_TOOL_STRICT_LEVEL": "2"}


def embedded_arguments(given: set[str]) -> list[str]:
    """What the embedded target is served with, beside what the command line names."""
    added = ["--model-path", str(ensure_target())]
    if "--served-model-name" not in given:
        added += ["--served-model-name", TARGET_NAME]
    if not any(name.startswith("--constrained-json") for name in given):
        # So small a model goes on with whitespace wherever a grammar allows it.
        added.append(COMPACT_JSON)
    return added
