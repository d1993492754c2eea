"""The data of the service: what is stored, what comes in and what goes out.

Users and items have a family of names each: `ThingBase` (what the table and the answers
share), `Thing` (the table), `ThingCreate` and `ThingUpdate` (request bodies) and
`ThingPublic` (answers). A table is never a request body: SQLModel does not validate
tables, and a client could choose its own id. What comes in has its own, stricter types.
"""

from contextlib import suppress
from datetime import UTC, datetime
from typing import Annotated, Literal

from email_validator import EmailNotValidError, validate_email
from pydantic import (
    MISSING,
    AfterValidator,
    GetJsonSchemaHandler,
    StringConstraints,
    WithJsonSchema,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError
from sqlalchemy import BigInteger, CheckConstraint, Index, Integer
from sqlmodel import Field, SQLModel

# --- Types of columns

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

    created_at: datetime = Field(
        default_factory=utc_now, sa_column_kwargs={"default": utc_now}
    )
    updated_at: datetime = Field(
        default_factory=utc_now,
        sa_column_kwargs={"default": utc_now, "onupdate": utc_now},
    )


# --- Types of what comes in: each ends a class of bad input, for every field


def storable(text: str) -> str:
    """Return a text that every database can store, else raise."""
    # PostgreSQL stores no NUL, and a lone surrogate (JSON's "\ud800") is no UTF-8.
    if "\0" in text or text.encode(errors="replace").decode() != text:
        raise PydanticCustomError(
            "text", "Leave out NUL characters and unpaired surrogates"
        )
    return text


def normal_email(text: str) -> str:
    """Return an address as it is stored, so that two spellings are one user."""
    email = ""
    if len(text) <= 254:  # before it is normalized, which takes long for a long text
        with suppress(EmailNotValidError):  # whose message may repeat what was sent
            parts = validate_email(
                text.lower(), check_deliverability=False, test_environment=True
            )
            email = parts.normalized.lower()
    if not 0 < len(email) <= 254:
        raise PydanticCustomError(
            "email", "Enter an email address, as name@example.com"
        )
    return email


def hashable(password: str) -> str:
    """Return a password that bcrypt reads to its end: it stops after 72 bytes."""
    if len(password) < 8 or len(password.encode()) > 72:
        raise PydanticCustomError(
            "password", "Choose a password of 8 characters to 72 bytes (UTF-8)"
        )
    return password


class Storable(AfterValidator):
    """A check for storable text, and its pattern in the API's documents."""

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return handler(schema) | {"pattern": "^[^\\u0000]*$"}


STORABLE = Storable(storable)  # behind the constraints of length, whose errors it hides
Text = Annotated[str, STORABLE]
Email = Annotated[
    Text,
    AfterValidator(normal_email),
    WithJsonSchema({"type": "string", "format": "email", "maxLength": 254}),
]
Password = Annotated[
    Text,
    AfterValidator(hashable),
    WithJsonSchema(
        {"type": "string", "format": "password", "minLength": 8, "maxLength": 72}
    ),
]
FullName = Annotated[str, StringConstraints(max_length=255), STORABLE]
Title = Annotated[str, StringConstraints(min_length=1, max_length=255), STORABLE]
Description = Annotated[str, StringConstraints(max_length=10_000), STORABLE]


class Body(SQLModel):
    """A JSON request body: refuses fields and types that it does not name."""

    model_config = {"extra": "forbid", "strict": True}


class Answer(SQLModel):
    """An answer's body: each field is always there, and its schema says so."""

    model_config = {"json_schema_serialization_defaults_required": True}


# --- Users


class UserBase(SQLModel):
    email: str = Field(max_length=254, unique=True)
    full_name: str | None = Field(default=None, max_length=255)
    is_active: bool = True
    is_superuser: bool = False


class User(Timestamps, UserBase, table=True):
    __tablename__ = "users"
    __table_args__ = (
        CheckConstraint("email = lower(email)", "email_lower"),
        CheckConstraint("length(email) <= 254", "email_length"),
        CheckConstraint("length(full_name) <= 255", "full_name_length"),
        KEEP_IDS,
    )

    id: int = Field(default=None, primary_key=True, sa_type=BigInt)
    hashed_password: str = Field(max_length=60, exclude=True, repr=False)  # never shown


class UserCreate(Body):
    email: Email
    password: Password
    full_name: FullName | None = None

    model_config = {
        "json_schema_extra": {
            "example": {
                "email": "ada@example.com",
                "password": "correct horse battery",
                "full_name": "Ada Lovelace",
            }
        }
    }


class UserUpdate(Body):
    """Only what is sent changes; `full_name` alone may be null, which clears it."""

    email: Email | MISSING = MISSING
    full_name: FullName | MISSING | None = MISSING
    password: Password | MISSING = MISSING
    current_password: Text | MISSING = MISSING
    is_active: bool | MISSING = MISSING
    is_superuser: bool | MISSING = MISSING

    model_config = {"json_schema_extra": {"example": {"full_name": "Ada King"}}}


class UserPublic(Answer, Timestamps, UserBase):
    id: int


# --- Items


class ItemBase(SQLModel):
    title: str = Field(max_length=255)
    description: str | None = Field(default=None, max_length=10_000)


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


class ItemCreate(Body):
    title: Title
    description: Description | None = None

    model_config = {
        "json_schema_extra": {
            "example": {"title": "Engine", "description": "Analytical, brass and steam"}
        }
    }


class ItemUpdate(Body):
    """Only what is sent changes; `description` may be null, which clears it."""

    title: Title | MISSING = MISSING
    description: Description | MISSING | None = MISSING

    model_config = {"json_schema_extra": {"example": {"title": "Difference engine"}}}


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


class Token(Answer):
    """The answer of the token endpoint (RFC 6749, section 5.1)."""

    access_token: str
    token_type: str = "bearer"  # noqa: S105 - no secret, a name of RFC 6750
    expires_in: int  # seconds
    refresh_token: str


class AccessToken(SQLModel):
    """What a verified access token says: which user, by which login."""

    sub: int = Field(ge=1, le=MAX_ID)
    sid: int = Field(ge=1, le=MAX_ID)


class PasswordGrant(SQLModel):
    """The form that logs in (RFC 6749, section 4.3.2)."""

    grant_type: Literal["password"]
    username: Text = Field(min_length=1, description="The email")
    password: Text = Field(min_length=1)

    model_config = {
        "json_schema_extra": {
            "example": {
                "grant_type": "password",
                "username": "ada@example.com",
                "password": "correct horse battery",
            }
        }
    }


class RefreshGrant(SQLModel):
    """The form that renews a login (RFC 6749, section 6)."""

    grant_type: Literal["refresh_token"]
    refresh_token: Text = Field(min_length=1)

    model_config = {
        "json_schema_extra": {
            "example": {"grant_type": "refresh_token", "refresh_token": "mdfW.2fwu"}
        }
    }


class Revocation(SQLModel):
    """The form that ends a login (RFC 7009, section 2.1)."""

    token: Text = Field(
        min_length=1,
        description="An access or refresh token",
        schema_extra={"examples": ["mdfW.2fwu"]},
    )


# --- What all routes share


class Page(SQLModel):
    """Which rows of a list to return, ascending by id."""

    skip: int = Field(default=0, ge=0, le=MAX_ID, description="Rows to leave out")
    limit: int = Field(default=100, ge=1, le=100, description="Rows to return at most")
    after: int = Field(default=0, ge=0, le=MAX_ID, description="Id to start behind")


class Problem(SQLModel):
    """An error: what was wrong and what to do."""

    detail: str


class OAuth2Problem(Problem):
    """An error of the token and revocation endpoints (RFC 6749, section 5.2)."""

    error: str
    error_description: str


class InvalidField(SQLModel):
    """What is wrong with the input, and where."""

    type: str
    loc: list[str | int]
    msg: str


class Invalid(SQLModel):
    """All that is wrong with the input."""

    detail: list[InvalidField]


class Health(SQLModel):
    """The answer of a health check."""

    status: Literal["healthy", "ready"]
