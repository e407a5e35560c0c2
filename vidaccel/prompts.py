"""Texts that videos are made of, as files and command lines bring them."""

from collections.abc import Iterable
from pathlib import Path

from vidaccel.errors import UserError


def prompts_in(file: Path) -> list[str]:
    """Those of a text file, one a line. Lines end where text editors end them (LF, CR LF or CR), not at the separators
    of Unicode that may stand within a prompt; a byte-order mark at the start is none of the first one.

    Raises:
        UserError: it cannot be read, is no UTF-8, or holds no prompt.
    """
    hint = "give a text file with one prompt a line, in UTF-8"
    try:
        content = file.read_bytes()
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read the prompts in {file}: {error.strerror}", hint) from error
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"cannot read the prompts in {file}: line {line} is no UTF-8", hint) from error
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise UserError(f"{file} holds no prompt", "write one prompt a line")
    return texts


def is_whole(text: str) -> bool:
    """Whether it has no lone surrogate: half of a character, which no tokenizer takes."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def check_prompts(texts: Iterable[str]) -> None:
    """`UserError` for a prompt that no tokenizer takes."""
    for text in texts:
        if not is_whole(text):
            shown = text.encode("ascii", "backslashreplace").decode()
            raise UserError(
                f'the prompt "{shown}" has half of a character (a lone surrogate)', "write it as text in UTF-8"
            )
