"""User and password for a store as they are now: each new connection asks for them.

A file with the password is read again when it changes (`app.shared`). Connections that are open stay as they are: a
store asks for the password once. While the store wants another one than the file holds, tries come after the pauses of
`sharing.link`, as for every other trouble.
"""

from __future__ import annotations


class StoreLogin:
    """See the module. To the client library it is a provider of credentials.

    user      None: the store's default user
    password  None: none
    """

    def __init__(self, user: str | None, password: str | None) -> None:
        self.user = user
        self.password = password
        self._former: str | None = None

    def __repr__(self) -> str:
        return f"<StoreLogin of {self.user or 'the default user'}>"

    @property
    def given(self) -> bool:
        """Whether there is something to log in with."""
        return bool(self.user or self.password)

    def renew(self, password: str) -> None:
        """Use another password for connections from now on."""
        if password != self.password:
            self._former, self.password = self.password, password

    def get_credentials(self) -> tuple[str, ...]:
        """Return what a connection sends: user and password, or the password alone."""
        password = self.password or ""
        return (self.user, password) if self.user else (password,)

    def hide(self, text: str) -> str:
        """Return a text without the passwords of now and before: a strange server may repeat what it got."""
        for password in (self.password, self._former):
            if password:
                text = text.replace(password, "***")
        return text
