"""Rows of the demo: small, real tasks from packages that bring their data along.

Everything is a pure function of the installed packages (for docstrings, of the Python version).
Each prompt has one answer, and no prompt appears twice.
"""

import importlib
import inspect
import itertools
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from lorafusion_jax.errors import DataError

type Row = tuple[str, str]

_LANGUAGES = {"fr": "French", "de": "German", "es": "Spanish", "it": "Italian"}
# Importing these has no side effects, and their docstrings are in Python's own sources.
_MODULES = (
    "argparse ast asyncio base64 bisect calendar cmd codecs collections colorsys configparser "
    "contextlib copy csv dataclasses datetime decimal difflib dis email email.message enum "
    "filecmp fileinput fnmatch fractions ftplib functools gettext glob graphlib gzip hashlib "
    "heapq hmac html http.client http.cookies imaplib inspect io ipaddress itertools json keyword "
    "linecache locale logging logging.handlers lzma mailbox math mimetypes multiprocessing netrc "
    "numbers operator os pathlib pickle pkgutil platform plistlib poplib pprint queue random re "
    "secrets selectors shelve shlex shutil smtplib socket socketserver sqlite3 ssl "
    "statistics string struct subprocess symtable tarfile tempfile textwrap threading timeit "
    "tokenize trace traceback types typing unittest unittest.mock urllib.parse urllib.request "
    "uuid wave weakref xml.dom.minidom xml.etree.ElementTree zipfile zoneinfo"
).split()
_DIALECTS = {
    "tsql": "T-SQL",
    "mysql": "MySQL",
    "postgres": "Postgres",
    "oracle": "Oracle",
    "bigquery": "BigQuery",
}
_TABLES = {
    "users": ("name", "email", "age"),
    "orders": ("total", "status", "paid_at"),
    "products": ("title", "price", "stock"),
    "events": ("kind", "city", "created"),
    "staff": ("role", "salary", "hired"),
    "books": ("author", "pages", "year"),
}
# In Postgres; {t} is a table, {a} and {b} are columns of it, {n} is a number.
_QUERIES = (
    "SELECT {a} FROM {t} LIMIT {n}",
    "SELECT {a}, {b} FROM {t} LIMIT {n}",
    "SELECT {a} FROM {t} WHERE {b} > 100 LIMIT {n}",
    "SELECT COALESCE({a}, {b}) FROM {t}",
    "SELECT CAST({a} AS TEXT) FROM {t}",
    "SELECT CAST({a} AS DOUBLE PRECISION) FROM {t}",
    "SELECT LENGTH({a}) FROM {t} WHERE {b} = {n}",
    "SELECT STRING_AGG({a}, ',') FROM {t}",
    "SELECT CURRENT_TIMESTAMP, {a} FROM {t}",
    "SELECT {a} || {b} FROM {t}",
    'SELECT "{a}" FROM "{t}"',
    "SELECT EXTRACT(YEAR FROM {a}) FROM {t}",
    "CREATE TABLE {t} ({a} TEXT, {b} INT)",
)
_MAX_SQL_CHARACTERS = 110


def translate_rows() -> Iterator[Row]:
    """Names of countries, languages and currencies, from Unicode CLDR through Babel."""
    babel = _needed("babel", "Babel")
    english = babel.Locale("en")
    for code, language in _LANGUAGES.items():
        other = babel.Locale(code)
        for kind in ("territories", "languages", "currencies"):
            names = getattr(other, kind)
            for key, name in sorted(getattr(english, kind).items()):
                if key in names:
                    yield f"Translate to {language}: {name} =", f" {names[key]}"


def emoji_rows() -> Iterator[Row]:
    """Emoji by their Unicode names, without the variants that differ in skin tone only."""
    emoji = _needed("emoji", "emoji")
    whole = emoji.STATUS["fully_qualified"]
    for symbol, data in sorted(emoji.EMOJI_DATA.items()):
        name = data["en"].strip(":").replace("_", " ")
        if data["status"] == whole and "skin tone" not in name:
            yield f"Emoji for {name}:", f" {symbol}"


def docstring_rows() -> Iterator[Row]:
    """First lines of the standard library's docstrings, from the signature."""
    seen: set[str] = set()
    for module in _MODULES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                owner = importlib.import_module(module)
            except ImportError:  # left out of this build of Python
                continue
            functions = list(_functions(module, owner))
        for name, function in functions:
            doc = (inspect.getdoc(function) or "").split("\n")[0].strip()
            signature = _signature(function)
            head = f'def {name}{signature}:\n    """'
            # Inherited methods repeat a text; held-out rows must not have been seen.
            whole = doc.endswith(".") and 10 < len(doc) <= 70
            if signature and whole and len(head) <= 70 and doc not in seen:
                seen.add(doc)
                yield head, f'{doc}"""'


def sql_rows() -> Iterator[Row]:
    """Short queries rewritten from one SQL dialect to another by sqlglot."""
    sqlglot = _needed("sqlglot", "sqlglot")

    def written(tree: Any, dialect: str) -> str:
        try:
            return tree.sql(dialect=dialect, unsupported_level=sqlglot.ErrorLevel.RAISE)
        except sqlglot.errors.UnsupportedError:
            return ""

    for query, source in itertools.product(_queries(), _DIALECTS):
        given = written(sqlglot.parse_one(query, read="postgres"), source)
        tree = sqlglot.parse_one(given, read=source) if given else None
        for target in _DIALECTS if tree else ():
            answer = written(tree, target)
            # sqlglot carries T-SQL's VARCHAR(MAX) into dialects that do not know MAX.
            right = answer not in ("", given) and ("(MAX)" not in answer or target == "tsql")
            if right and len(given) + len(answer) <= _MAX_SQL_CHARACTERS:
                yield f"{_DIALECTS[source]}: {given}\n{_DIALECTS[target]}:", f" {answer}"


def spelling_rows() -> Iterator[Row]:
    """Common misspellings, from codespell's dictionary; not part of the demo unless asked for."""
    package = _needed("codespell_lib", "codespell")
    with open(f"{package.__path__[0]}/data/dictionary.txt", encoding="utf-8") as file:
        for line in file:
            wrong, _, right = line.strip().partition("->")
            if right and "," not in right:
                yield f"Correct the spelling: {wrong}\nAnswer:", f" {right}"


TASKS: dict[str, Callable[[], Iterator[Row]]] = {
    "translate": translate_rows,
    "emoji": emoji_rows,
    "docstring": docstring_rows,
    "sql": sql_rows,
    "spelling": spelling_rows,
}


def _queries() -> list[str]:
    """The demo's queries in Postgres, each once."""
    queries = {}
    for number, (table, columns) in enumerate(_TABLES.items()):
        for which, query in enumerate(_QUERIES):
            for a, b in itertools.permutations(columns, 2):
                count = (number * 7 + which * 3 + len(a)) % 20 + 1
                queries[query.format(t=table, a=a, b=b, n=count)] = None
    return list(queries)


def _needed(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise DataError(f"the demo needs the package {package}: pip install {package}") from None


def _functions(module: str, owner: ModuleType) -> Iterator[tuple[str, object]]:
    """Public functions and methods that the module itself defines, in order of definition."""
    for name, value in vars(owner).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module:
            continue
        if inspect.isclass(value):
            for method, function in vars(value).items():
                if not method.startswith("_") and inspect.isfunction(function):
                    yield f"{name}.{method}", function
        elif inspect.isroutine(value):
            yield f"{module}.{name}", value


def _signature(function: object) -> str:
    """Parameters by name, without defaults and annotations; empty if there is no signature."""
    if not callable(function):
        return ""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError):
        return ""
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    names = [f"{stars.get(parameter.kind, '')}{parameter.name}" for parameter in parameters]
    return f"({', '.join(names)})"
