"""Real tools: a calculator, a SQLite database and a file search, with the schemas a model is given."""

import ast
import json
import operator
import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

Table = Literal["orders", "customers"]
Aggregate = Literal["count", "total", "largest"]

_OPERATORS: Mapping[type[ast.AST], Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


def calculate(expression: str) -> str:
    """Work out an arithmetic expression with + - * / and parentheses.

    Args:
        expression: the expression, such as (3+4)*12.
    """
    try:
        return f"{_evaluate(ast.parse(expression, mode='eval').body):.15g}"
    except (SyntaxError, ValueError, ZeroDivisionError) as error:
        return f"error: {error}"


def _evaluate(node: ast.AST) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_evaluate(node.left), _evaluate(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_evaluate(node.operand))
    raise ValueError("only numbers, + - * / and parentheses are allowed")


def query_shop(table: Table, aggregate: Aggregate) -> str:
    """Ask the shop's database for one figure.

    Args:
        table: which records to look at.
        aggregate: how many there are, what they add up to, or the largest.
    """
    function = {"count": "COUNT(amount)", "total": "SUM(amount)", "largest": "MAX(amount)"}[aggregate]
    with sqlite3.connect(":memory:") as shop:
        shop.executescript(
            "CREATE TABLE orders (id INTEGER PRIMARY KEY, amount REAL);"
            "CREATE TABLE customers (id INTEGER PRIMARY KEY, amount REAL);"
            "INSERT INTO orders (amount) VALUES (19.5), (240.0), (75.25);"
            "INSERT INTO customers (amount) VALUES (259.5), (75.25);"
        )
        # Both names come from closed lists, checked by the caller against the schema.
        row = shop.execute(f"SELECT {function} FROM {table}").fetchone()
    return f"{row[0]:.15g}"


def search_files(word: str) -> str:
    """Find the example files that contain a word.

    Args:
        word: the word to look for.
    """
    folder = Path(__file__).parent
    found = [path.name for path in sorted(folder.glob("*.*")) if word.lower() in path.read_text("utf-8").lower()]
    return ", ".join(found) or "no file contains it"


TOOLS: Mapping[str, Callable[..., str]] = {
    "calculate": calculate,
    "query_shop": query_shop,
    "search_files": search_files,
}


def _schema(name: str, properties: dict[str, Any]) -> dict[str, Any]:
    function = TOOLS[name]
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    description = (function.__doc__ or "").split("\n")[0]
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters, "strict": True},
    }


# `strict` makes the server's grammar enforce the schema, so that arguments are valid whatever the model.
SCHEMAS: dict[str, Any] = {
    "calculate": _schema("calculate", {"expression": {"type": "string", "pattern": r"^[0-9][0-9+*/ ()-]{0,20}[0-9]$"}}),
    "query_shop": _schema(
        "query_shop",
        {
            "table": {"type": "string", "enum": ["orders", "customers"]},
            "aggregate": {"type": "string", "enum": ["count", "total", "largest"]},
        },
    ),
    "search_files": _schema("search_files", {"word": {"type": "string", "pattern": "^[a-z]{2,12}$"}}),
}


def run_tool(name: str, arguments: str) -> str:
    """Call a tool with the JSON arguments a model wrote.

    Raises: ValueError if they do not fit the tool's schema.
    """
    schema = SCHEMAS[name]["function"]["parameters"]
    values = json.loads(arguments)
    if not isinstance(values, dict) or sorted(values) != sorted(schema["required"]):
        raise ValueError(f"{name} takes {schema['required']}, not {arguments}")
    for field, value in values.items():
        allowed = schema["properties"][field].get("enum")
        if not isinstance(value, str) or (allowed and value not in allowed):
            raise ValueError(f"{name}.{field} may not be {value!r}")
    return TOOLS[name](**values)
