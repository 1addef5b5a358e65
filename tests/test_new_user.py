"""What `scripts/new_user.py` takes from a page: every command and the whole of the Python, in their order."""

import pytest
from loaded_scripts import SCRIPTS, load_script

script = load_script("new_user")

PAGE = """
```console
make demo     # installs, and more
serve --with TARGET
```
```python
a = 1
```
```console
curl one \\
    two
```
```python
print(a)
```
```text
what it prints
```
```console
stop
```
"""


def test_the_steps_of_a_page() -> None:
    assert script.steps_of(PAGE) == [
        ("console", "make demo"),
        ("console", "curl one     two"),
        ("python", "a = 1\nprint(a)\n"),
        ("console", "stop"),
    ]


@pytest.mark.parametrize("name", script.PAGES)
def test_our_pages_have_steps_of_both_kinds(name: str) -> None:
    steps = script.steps_of((SCRIPTS.parent / name).read_text("utf-8"))
    assert {"console", "python"} == {kind for kind, _ in steps}
    assert sum(said.startswith("whiflash serve") for _, said in steps) == 1
