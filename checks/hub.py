"""What asking the hub may raise, for all who ask it."""


def cannot_be_asked() -> tuple[type[Exception], ...]:
    """What httpx raises before it asks: at a proxy's address, or for want of a package that the proxy takes."""
    import httpx

    return ImportError, ValueError, httpx.InvalidURL


def does_not_answer() -> tuple[type[Exception], ...]:
    """What is raised where the hub, a proxy or the network refuses."""
    import httpx
    from huggingface_hub import errors

    return errors.HfHubHTTPError, httpx.HTTPError, OSError
