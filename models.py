"""The data models: tables, request bodies and responses.

`UserBase` has the fields that `User` (the table), `UserCreate` (a request body) and
`UserPublic` (a response) share; items have the same models. Never use a table model as
a request body: SQLModel does not validate it, and clients could set any column.
"""

from datetime import UTC, datetime
from functools import partial
from hashlib import sha256
from typing import Annotated, Any, ClassVar, Literal
from unicodedata import normalize

import pydantic
from pydantic import MISSING, AfterValidator, EmailStr, StrictBool
from pydantic_core import PydanticCustomError
from sqlalchemy import BigInteger, Column, Enum, Index, Integer, event
from sqlmodel import Field, SQLModel

SQLModel.model_config["hide_input_in_errors"] = True  # a log must not show values
# A migration can only drop constraints that have names.
SQLModel.metadata.naming_convention = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}


@event.listens_for(Column, "before_parent_attach")
def store_enum_as_text(column: Any, _: object) -> None:
    """Store the values of an enumeration as text: SQLModel stores its names."""
    if isinstance(column.type, Enum) and column.type.enum_class:
        options: Any = {"native_enum": False, "length": 50}
        options["values_callable"] = lambda enum: [str(member.value) for member in enum]
        column.type = Enum(column.type.enum_class, **options)


# 64 bits. SQLite generates ids only if the type is INTEGER, which has 64 bits, too.
BigInt = BigInteger().with_variant(Integer, "sqlite")
MAX_ID = 2**63 - 1
utc_now = partial(datetime.now, UTC)


class Timestamps(SQLModel):
    """When a row was created and last updated, in UTC."""

    created_at: datetime = Field(default_factory=utc_now)
    updated_at: datetime = Field(
        default_factory=utc_now, sa_column_kwargs={"onupdate": utc_now}
    )


class TableBase(Timestamps):
    """The columns of every table: the primary key and the timestamps."""

    __tablename__: ClassVar[Any]  # for type checkers
    id: int = Field(default=None, primary_key=True, sa_type=BigInt)


def foreign_key(
    column: str,
    ondelete: Literal["CASCADE", "SET NULL", "RESTRICT"] = "CASCADE",
    **options: Any,
) -> Any:
    """Return a field that references a column such as "users.id", with an index.

    `ondelete` says what happens to this row when the referenced row is deleted;
    `options` are passed to SQLModel's `Field`, such as `default=None`.
    """
    all_options: Any = {"index": True, "sa_type": BigInteger} | options
    return Field(foreign_key=column, ondelete=ondelete, **all_options)


# --- Types of fields

# Keyboards send an "ü" as one character or as two; NFC makes it one.
NFC = AfterValidator(partial(normalize, "NFC"))
# Longer than any real one; the limit saves memory when many requests log in at once.
Credential = Annotated[str, pydantic.Field(max_length=1000)]
# A password to check: the rules for new passwords do not apply.
CurrentPassword = Annotated[Credential, NFC]


def check_new_password(password: str) -> str:
    """Reject a password that is short, over bcrypt's 72 bytes, or contains NUL."""
    if len(password) < 8:
        raise PydanticCustomError(
            "password", "Password should have at least 8 characters"
        )
    if len(password.encode()) > 72:
        raise PydanticCustomError("password", "Password should have at most 72 bytes")
    if "\0" in password:
        raise PydanticCustomError("password", "Password should have no NUL character")
    return password


Password = Annotated[
    CurrentPassword,
    AfterValidator(check_new_password),
    pydantic.Field(
        examples=["correct horse"],
        json_schema_extra={"format": "password", "minLength": 8, "maxLength": 72},
    ),
]
# Stored in lower case, so that the same email in another case is the same user.
Email = Annotated[EmailStr, AfterValidator(str.lower), pydantic.Field(max_length=254)]
FullName = Annotated[str | None, pydantic.Field(max_length=255, examples=["Ada King"])]
Title = Annotated[str, pydantic.Field(min_length=1, max_length=255, examples=["Card"])]
Description = Annotated[str | None, pydantic.Field(max_length=10_000, examples=["Red"])]
Id = Annotated[int, pydantic.Field(ge=1, le=MAX_ID)]


class RequestBody(SQLModel):
    """The base of JSON request bodies. Unknown fields are not allowed."""

    model_config = {"extra": "forbid"}


class ResponseModel(SQLModel):
    """The base of responses. In the OpenAPI schema, every field is required."""

    model_config = {"json_schema_serialization_defaults_required": True}


# --- Users


class UserBase(SQLModel):
    email: str = Field(max_length=254, unique=True)  # in requests: Email
    full_name: FullName = None


class UserPermissions(SQLModel):
    """Permissions. Only superusers can change them, and not their own."""

    is_active: bool = True
    is_superuser: bool = False


class User(TableBase, UserPermissions, UserBase, table=True):
    __tablename__ = "users"
    hashed_password: str = Field(max_length=60, exclude=True, repr=False)


class UserCreate(RequestBody, UserBase):
    email: Email
    password: Password


class UserUpdate(RequestBody):
    """Only the fields you send change. `full_name: null` clears the name."""

    # Fields that are not in UserCreate, except `current_password`, are permissions.
    # MISSING is the value of a field that is not sent; None would allow null.
    email: Email | MISSING = MISSING
    full_name: FullName | MISSING = MISSING
    password: Password | MISSING = MISSING
    current_password: CurrentPassword | MISSING = MISSING
    is_active: StrictBool | MISSING = MISSING
    is_superuser: StrictBool | MISSING = MISSING

    model_config = {"json_schema_extra": {"example": {"full_name": "Ada King"}}}


class UserPublic(ResponseModel, Timestamps, UserPermissions, UserBase):
    id: int


# --- Items


class ItemBase(SQLModel):
    title: Title
    description: Description = None


class Item(TableBase, ItemBase, table=True):
    __tablename__ = "items"
    __table_args__ = (Index(None, "owner_id", "id"),)  # for pages of an owner's items
    owner_id: int = foreign_key("users.id", index=False)


class ItemCreate(RequestBody, ItemBase): ...


class ItemUpdate(RequestBody):
    """Only the fields you send change. `description: null` clears it."""

    title: Title | MISSING = MISSING
    description: Description | MISSING = MISSING


class ItemPublic(ResponseModel, Timestamps, ItemBase):
    id: int
    owner_id: int


# --- Logins


def digest(text: str) -> str:
    """Return the SHA-256 hash of a text in hexadecimal."""
    return sha256(text.encode()).hexdigest()


class Login(TableBase, table=True):
    """One login. Without this row, none of its tokens is valid.

    A refresh token is `family.secret`. The family stays the same for the whole login;
    each use replaces the secret. A known family with another secret is a used token: it
    may be stolen (RFC 9700). Access tokens have the family as their `sid`.
    """

    __tablename__ = "logins"
    user_id: int = foreign_key("users.id")
    family_hash: str = Field(max_length=64, unique=True, repr=False)
    secret_hash: str = Field(max_length=64, repr=False)
    expires_at: datetime


class LoginAttempt(TableBase, table=True):
    """A failed password check, kept while it counts towards the limit."""

    __tablename__ = "login_attempts"
    __table_args__ = (Index(None, "key", "created_at"),)
    key: str = Field(max_length=64)  # hash of what attempts are counted by


class PasswordGrant(SQLModel):
    """The form to log in (RFC 6749, section 4.3.2)."""

    grant_type: Literal["password"]
    # A text that is not an email address is allowed: no user has it.
    username: Email | Credential = pydantic.Field(union_mode="left_to_right")
    password: CurrentPassword = pydantic.Field(examples=["correct horse"])


class RefreshGrant(SQLModel):
    """The form to refresh a login (RFC 6749, section 6)."""

    grant_type: Literal["refresh_token"]
    refresh_token: Credential = pydantic.Field(examples=["mdfW.2fwu"])


class Token(ResponseModel):
    """The token endpoint's response (RFC 6749, section 5.1)."""

    access_token: str
    token_type: str = "bearer"  # noqa: S105 - not a secret
    expires_in: int  # seconds
    refresh_token: str


class TokenClaims(pydantic.BaseModel):
    """The claims of an access token: the user and the login."""

    sub: Id
    exp: int
    sid: Annotated[str, AfterValidator(digest)]  # Login.family_hash


# --- Shared by all routes


class PageParams(SQLModel):
    """The query parameters of a page."""

    skip: int = Field(default=0, ge=0, le=MAX_ID, description="Rows to skip")
    limit: int = Field(default=100, ge=1, le=100, description="Maximum number of rows")
    after: int | None = Field(None, ge=0, le=MAX_ID, description="Start after this id")
    sort: Literal["id", "-id"] = Field(default="id", description="`-id`: newest first")


class ErrorResponse(SQLModel):
    detail: str


class OAuth2ErrorResponse(ErrorResponse):
    """An error response of the OAuth2 endpoints (RFC 6749, section 5.2)."""

    error: str
    error_description: str
