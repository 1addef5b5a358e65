"""SGLang's application with WHIFLASH's hooks, for the processes of `--tokenizer-worker-num` above one.

SGLang imports it in each of them (`SGLANG_HTTP_SERVER_APP_PATH`), with the launcher's arguments in shared memory.
"""

from sglang.srt.entrypoints import http_server
from sglang.srt.managers.multi_tokenizer_mixin import get_main_process_id, read_from_shared_memory
from sglang.srt.plugins import load_plugins

from whiflash_sglang.http import command_line

load_plugins()  # SGLang's own application loads none, but its workers look the algorithm up by name
_, _server_args, _ = read_from_shared_memory(f"multi_tokenizer_args_{get_main_process_id()}")
command_line.patch_launcher(_server_args)
app = http_server.app
