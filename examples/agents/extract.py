"""Structured extraction over a folder of documents: each becomes a record under a JSON schema.

The default folder holds the README files and licences of installed Python packages, which every machine has.
"""

import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from session import Session
from whiflash_sdk import routing

DOCUMENTS = 3
CHARACTERS = 600


class Card(BaseModel):
    """Facts that the model extracts from a document."""

    model_config = ConfigDict(extra="forbid")

    title: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]{0,40}$")
    kind: Literal["licence", "manual", "metadata", "other"]
    year: int = Field(ge=1970, le=2030)


def documents(folder: Path) -> Iterator[Path]:
    """Yield the licences and descriptions of installed packages in `folder`, in name order."""
    for pattern in ("openai-*", "pydantic-*", "httpx-*", "anyio-*"):
        for info in sorted(folder.glob(f"{pattern}.dist-info")):
            yield from sorted(info.glob("METADATA"))
            yield from sorted(info.glob("**/LICENSE*"))


def main() -> None:
    session = Session.from_command_line(__doc__)
    client = session.client()
    found = list(documents(Path(sysconfig.get_path("purelib"))))[:DOCUMENTS]
    assert found, "no documents"
    for path in found:
        text = path.read_text("utf-8", errors="replace")[:CHARACTERS]
        response = client.chat.completions.parse(
            model=session.model,
            temperature=0,
            max_tokens=80,
            response_format=Card,
            messages=[
                {"role": "system", "content": "Extract the document's title, kind and year as JSON."},
                {"role": "user", "content": text},
            ],
        )
        card = response.choices[0].message.parsed
        assert isinstance(card, Card), response.choices[0].message.content
        print(f"{path.parent.name}/{path.name}: {card}")
        session.record(path.name, [routing(response)], response.choices[0].message.content or "")
    session.report()


if __name__ == "__main__":
    main()
