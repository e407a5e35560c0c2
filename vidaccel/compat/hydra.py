"""Parts of Hydra that its documentation names nowhere."""


def quoted(text: str) -> str:
    """The text as a value in Hydra's grammar of overrides, whatever characters it has."""
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(text, Quote.single).with_quotes()
