"""The data of the service: what is stored, what comes in and what goes out.

Users and items have a family of names each: `ThingBase` (what they share),
`Thing` (the table), `ThingCreate` and `ThingUpdate` (request bodies) and `ThingPublic`
(answers). A table is never a request body: SQLModel does not validate tables, and a
client could choose its own id.
"""

from contextlib import suppress
from datetime import UTC, datetime
from typing import Annotated, Literal

import pydantic
from email_validator import EmailNotValidError, validate_email
from pydantic import MISSING
from pydantic_core import PydanticCustomError
from sqlalchemy import BigInteger, CheckConstraint, Index, Integer
from sqlmodel import Field, SQLModel

# --- Columns

# Named, so that a migration can drop a constraint on any database, SQLite included.
SQLModel.metadata.naming_convention = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}

# 64 bits. SQLite numbers rows by itself only where the type is spelled INTEGER, and
# gives a deleted row's id to the next one unless asked not to (AUTOINCREMENT).
BigInt = BigInteger().with_variant(Integer, "sqlite")
MAX_ID = 2**63 - 1
KEEP_IDS = {"sqlite_autoincrement": True}


def utc_now() -> datetime:
    """Return the time with its offset, as SQLModel stores it on every database."""
    return datetime.now(UTC)


class Timestamps(SQLModel):
    """When a row was made and when it last changed, on every table."""

    created_at: datetime = Field(default_factory=utc_now)
    updated_at: datetime = Field(
        default_factory=utc_now, sa_column_kwargs={"onupdate": utc_now}
    )


# --- Types of what comes in: each ends a class of bad input, for every field


def normal_email(text: str) -> str:
    """Return an address as it is stored, so that two spellings are one user.

    Of at most 254 characters, which `Email` checks first: to normalize takes long.
    """
    email = ""
    with suppress(EmailNotValidError):  # whose message may repeat what was sent
        checked = validate_email(
            text.lower(),
            check_deliverability=False,
            test_environment=True,  # .test, for trying things out
        )
        email = checked.normalized.lower()  # it may bring capitals back
    if not 0 < len(email) <= 254:
        message = "Enter an email address, as name@example.com"
        raise PydanticCustomError("email", message)
    return email


def hashable(password: str) -> str:
    """Return a password that bcrypt reads to its end."""
    if "\0" in password or len(password.encode()) > 72:
        message = "Choose one of at most 72 bytes (UTF-8), without NUL"
        raise PydanticCustomError("password", message)
    return password


# PostgreSQL stores no NUL, and a lone surrogate (JSON's "\ud800") cannot be encoded:
# pydantic refuses it where it has a pattern or a length to check. A pattern stands
# behind the lengths, or SQLModel would not see them.
STORABLE = pydantic.StringConstraints(pattern=r"^[^\x00]*$")
Text = Annotated[str, STORABLE]
Filled = Annotated[str, pydantic.Field(min_length=1), STORABLE]
Email = Annotated[
    str,
    pydantic.Field(max_length=254, json_schema_extra={"format": "email"}),
    pydantic.AfterValidator(normal_email),
]
Password = Annotated[
    str,
    pydantic.Field(min_length=8, max_length=72, examples=["correct horse"]),
    pydantic.Field(json_schema_extra={"format": "password"}),
    pydantic.AfterValidator(hashable),
]
FullName = Annotated[Text | None, pydantic.Field(max_length=255, examples=["Ada King"])]
Title = Annotated[
    str, pydantic.Field(min_length=1, max_length=255, examples=["Engine"]), STORABLE
]
Description = Annotated[
    Text | None, pydantic.Field(max_length=10_000, examples=["Brass and steam"])
]
Id = Annotated[int, pydantic.Field(ge=1, le=MAX_ID)]


class Body(SQLModel):
    """A JSON request body: refuses fields and types that it does not name."""

    model_config = {"extra": "forbid", "strict": True}


class Answer(SQLModel):
    """An answer's body: each field is always there, and its schema says so."""

    model_config = {"json_schema_serialization_defaults_required": True}


# --- Users


class UserBase(SQLModel):
    # Checked where it comes in, as Email, not again when it goes out.
    email: str = Field(max_length=254, unique=True)
    full_name: FullName = None


class User(Timestamps, UserBase, table=True):
    __tablename__ = "users"
    __table_args__ = (
        CheckConstraint("email = lower(email)", "email_lower"),
        CheckConstraint("length(email) <= 254", "email_length"),
        CheckConstraint("length(full_name) <= 255", "full_name_length"),
        KEEP_IDS,
    )

    id: int = Field(default=None, primary_key=True, sa_type=BigInt)
    is_active: bool = True
    is_superuser: bool = False
    hashed_password: str = Field(max_length=60, exclude=True, repr=False)  # never shown


class UserCreate(Body, UserBase):
    email: Email
    password: Password


class UserUpdate(Body):
    """Only what is sent changes; `full_name` alone may be null, which clears it."""

    email: Email | MISSING = MISSING
    full_name: FullName | MISSING = MISSING
    password: Password | MISSING = MISSING
    current_password: Text | MISSING = MISSING
    is_active: bool | MISSING = MISSING
    is_superuser: bool | MISSING = MISSING

    model_config = {"json_schema_extra": {"example": {"full_name": "Ada King"}}}


class UserPublic(Answer, Timestamps, UserBase):
    id: int
    is_active: bool
    is_superuser: bool


# --- Items


class ItemBase(SQLModel):
    title: Title
    description: Description = None


class Item(Timestamps, ItemBase, table=True):
    __tablename__ = "items"
    __table_args__ = (
        CheckConstraint("length(title) BETWEEN 1 AND 255", "title_length"),
        CheckConstraint("length(description) <= 10000", "description_length"),
        Index(None, "owner_id", "id"),  # an owner's page, in order, at any depth
        KEEP_IDS,
    )

    id: int = Field(default=None, primary_key=True, sa_type=BigInt)
    owner_id: int = Field(foreign_key="users.id", ondelete="CASCADE", sa_type=BigInt)


class ItemCreate(Body, ItemBase):
    pass


class ItemUpdate(Body):
    """Only what is sent changes; `description` may be null, which clears it."""

    title: Title | MISSING = MISSING
    description: Description | MISSING = MISSING


class ItemPublic(Answer, Timestamps, ItemBase):
    id: int
    owner_id: int


# --- Logins


class Login(Timestamps, table=True):
    """One login, from password to logout; deleted when it ends, its tokens with it.

    A refresh token is `family.secret`: the family stays for the login's life, the
    secret is new at each use (RFC 9700). A known family with another secret is thus
    a token that was spent before: a thief's or a victim's.
    """

    __tablename__ = "logins"
    __table_args__ = (KEEP_IDS,)  # an old token must never name a new login

    id: int = Field(default=None, primary_key=True, sa_type=BigInt)
    user_id: int = Field(
        foreign_key="users.id", ondelete="CASCADE", index=True, sa_type=BigInt
    )
    family_hash: str = Field(max_length=64, unique=True, repr=False)  # SHA-256, hex
    secret_hash: str = Field(max_length=64, repr=False)
    expires_at: datetime = Field(index=True)


class LoginAttempt(Timestamps, table=True):
    """A guess at a password that has not proved right, kept while it counts."""

    __tablename__ = "login_attempts"
    __table_args__ = (
        Index(None, "pair_hash", "created_at"),
        Index(None, "created_at"),
        KEEP_IDS,
    )

    id: int = Field(default=None, primary_key=True, sa_type=BigInt)
    pair_hash: str = Field(max_length=64)  # see `check_password`


class PasswordGrant(SQLModel):
    """The form that logs in (RFC 6749, section 4.3.2)."""

    grant_type: Literal["password"]
    username: Filled = pydantic.Field(examples=["user@example.com"])
    password: Filled = pydantic.Field(examples=["correct horse"])


class RefreshGrant(SQLModel):
    """The form that renews a login (RFC 6749, section 6)."""

    grant_type: Literal["refresh_token"]
    refresh_token: Filled = pydantic.Field(examples=["mdfW.2fwu"])


class Token(Answer):
    """The answer of the token endpoint (RFC 6749, section 5.1)."""

    access_token: str
    token_type: str = "bearer"  # noqa: S105 - no secret, a name of RFC 6750
    expires_in: int  # seconds
    refresh_token: str


class AccessToken(SQLModel):
    """What a verified access token says: which user, by which login."""

    sub: Id
    sid: Id


# --- What all routes share


class Page(SQLModel):
    """Which rows of a list to return, ascending by id."""

    skip: int = Field(default=0, ge=0, le=MAX_ID, description="Rows to leave out")
    limit: int = Field(default=100, ge=1, le=100, description="Rows to return at most")
    after: int = Field(default=0, ge=0, le=MAX_ID, description="Greater ids only")


class Problem(SQLModel):
    """An error: what was wrong and what to do."""

    detail: str


class OAuth2Problem(Problem):
    """An error of the token and revocation endpoints (RFC 6749, section 5.2)."""

    error: str
    error_description: str
