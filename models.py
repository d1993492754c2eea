"""The data of the service: what is stored, what comes in and what goes out.

`UserBase` is shared by `User` (the table), `UserCreate` (a request body) and
`UserPublic` (an answer); items are alike. A table is never a request body: SQLModel
does not validate tables, and a client could choose its own id.
"""

from contextlib import suppress
from datetime import UTC, date, datetime
from hashlib import sha256
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin
from zlib import crc32

import pydantic
import sqlalchemy as sa
from email_validator import EmailNotValidError, validate_email
from pydantic import MISSING, StrictBool
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError
from sqlalchemy import BigInteger, CheckConstraint, Index, Integer
from sqlalchemy.orm import Mapper
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

# 64 bits. SQLite numbers rows by itself only where the type is spelled INTEGER.
BigInt = BigInteger().with_variant(Integer, "sqlite")
MAX_ID = 2**63 - 1


def utc_now() -> datetime:
    """Return the time with its offset, as SQLModel stores it on every database."""
    return datetime.now(UTC)


class Timestamps(SQLModel):
    """When a row was made and when it last changed, on every table."""

    created_at: datetime = Field(default_factory=utc_now)
    updated_at: datetime = Field(
        default_factory=utc_now, sa_column_kwargs={"onupdate": utc_now}
    )


class Record(Timestamps):
    """What a table begins with: its key, and the timestamps."""

    id: int = Field(default=None, primary_key=True, sa_type=BigInt)


def reference(
    column: str,
    ondelete: Literal["CASCADE", "SET NULL", "RESTRICT"] = "CASCADE",
    **options: Any,
) -> Any:
    """Return a field that refers to another table's row by its column, as "users.id".

    `ondelete`: what happens to this row when that one is deleted; by default it is
    deleted, too. `options`: of SQLModel's Field. Without its index, each deletion there
    would read this whole table.
    """
    others: Any = {"index": True, "sa_type": BigInt} | options
    return Field(foreign_key=column, ondelete=ondelete, **others)


LIMITS = {
    "min_length": ">=",
    "max_length": "<=",
    "ge": ">=",
    "le": "<=",
    "gt": ">",
    "lt": "<",
}


def rules(field: FieldInfo) -> list[Any]:
    """Return what a field must fulfil: `Text`, `Text | None` and so on."""
    found = list(field.metadata)
    if get_origin(field.annotation) in (Union, UnionType):
        for part in get_args(field.annotation):
            found += FieldInfo.from_annotation(part).metadata
    return found


@sa.event.listens_for(Mapper, "after_mapper_constructed")
def complete_table(mapper: Mapper[Any], model: type[SQLModel]) -> None:
    """Give each table, as it is defined, what nobody should have to remember.

    A CHECK for each limit of a field: SQLite ignores the length of a VARCHAR. Its name
    has the limit, since Alembic compares names. Enums are stored as text: a type of
    their own would not change with the column.
    """
    table: Any = mapper.local_table
    # SQLite gives a deleted row's id to the next row, unless told not to.
    if table.primary_key.columns.keys() == ["id"]:
        table.dialect_options["sqlite"]["autoincrement"] = True
    for column in table.columns:
        checks: dict[str, Any] = {}
        if isinstance(column.type, sa.Enum):
            column.type.native_enum = False
            choices = crc32(repr(column.type.enums).encode())
            checks[f"{column.name}_in_{choices:08x}"] = column.in_(column.type.enums)
        field = mapper.get_property_by_column(column).key  # may have another name
        for rule in rules(model.model_fields[field]):
            for limit, operator in LIMITS.items():
                value: Any = getattr(rule, limit, None)
                is_length = "length" in limit
                if value is None or (is_length and not hasattr(column.type, "length")):
                    continue  # the length of a list in JSON, for one
                measured = sa.func.length(column) if is_length else column
                checks[f"{column.name}_{limit}_{value}"] = measured.op(operator)(value)
        for name, check in checks.items():
            table.append_constraint(CheckConstraint(check, name))


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


def not_a_number(value: Any) -> Any:
    """Refuse seconds, as a number or a text, where a date is asked for."""
    try:
        with suppress(OverflowError):  # which is a number, too
            float(value)
    except (TypeError, ValueError):
        return value
    raise PydanticCustomError("date", "Enter 2030-01-02, or 2030-01-02T03:04:05Z")


def in_utc(moment: datetime) -> datetime:
    """Return a time as the database gives it back."""
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        raise PydanticCustomError("time", "Enter a time until the year 9999") from None


# PostgreSQL stores no NUL. pydantic refuses a lone surrogate (JSON's "\ud800") where it
# has a pattern or a length to check. A pattern stands behind the lengths, or SQLModel
# would not see them.
STORABLE = pydantic.StringConstraints(pattern=r"^[^\x00]*$")
Text = Annotated[str, STORABLE]
NonEmpty = Annotated[str, pydantic.Field(min_length=1), STORABLE]
# Longer than anybody's, and short enough for many logins at once to fit into memory.
Credential = Annotated[str, pydantic.Field(min_length=1, max_length=1000), STORABLE]
Email = Annotated[
    str,
    # Phones' keyboards leave a space behind an address.
    pydantic.StringConstraints(strip_whitespace=True, max_length=254),
    pydantic.Field(json_schema_extra={"format": "email"}),
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
# In a path or a query, where all is text; in a JSON body only a number will do, and
# beyond 2**53 it would not be exact for everybody.
Id = Annotated[int, pydantic.Field(ge=1, le=MAX_ID)]
StrictId = Annotated[pydantic.StrictInt, pydantic.Field(ge=1, le=2**53 - 1)]
# Texts: pydantic would also take a number of seconds. A moment has its offset.
Day = Annotated[date, pydantic.BeforeValidator(not_a_number)]
Moment = Annotated[
    pydantic.AwareDatetime,
    pydantic.BeforeValidator(not_a_number),
    pydantic.AfterValidator(in_utc),
]


class Body(SQLModel):
    """A JSON request body: refuses fields that it does not name."""

    model_config = {"extra": "forbid"}


class Answer(SQLModel):
    """An answer's body: each field is always there, and its schema says so."""

    model_config = {"json_schema_serialization_defaults_required": True}


# --- Users


class UserBase(SQLModel):
    # Requests check it as Email, answers do not check it again.
    email: str = Field(max_length=254, unique=True)
    full_name: FullName = None


class UserRights(SQLModel):
    """What a user may do: a superuser's to change, and never one's own."""

    is_active: bool = True
    is_superuser: bool = False


class User(Record, UserRights, UserBase, table=True):
    __tablename__ = "users"
    __table_args__ = (CheckConstraint("email = lower(email)", "email_lower"),)

    hashed_password: str = Field(max_length=60, exclude=True, repr=False)  # never shown


class UserCreate(Body, UserBase):
    """What anybody may choose for themself: when they register, and later."""

    email: Email
    password: Password


class UserUpdate(Body):
    """Only what is sent changes; `full_name` alone may be null, which clears it.

    What is here and not in `UserCreate` takes a superuser: see `update_user`.
    """

    email: Email | MISSING = MISSING
    full_name: FullName | MISSING = MISSING
    password: Password | MISSING = MISSING
    current_password: Text | MISSING = MISSING
    is_active: StrictBool | MISSING = MISSING
    is_superuser: StrictBool | MISSING = MISSING

    model_config = {"json_schema_extra": {"example": {"full_name": "Ada King"}}}


class UserPublic(Answer, Timestamps, UserRights, UserBase):
    id: int


# --- Items


class ItemBase(SQLModel):
    title: Title
    description: Description = None


class Item(Record, ItemBase, table=True):
    __tablename__ = "items"
    __table_args__ = (
        Index(None, "owner_id", "id"),  # an owner's page, in order, at any depth
    )

    owner_id: int = reference("users.id", index=False)


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


def digest(text: str) -> str:
    """Return the SHA-256 of a text, in hexadecimal."""
    return sha256(text.encode()).hexdigest()


class Login(Record, table=True):
    """One login, from password to logout; deleted when it ends, its tokens with it.

    A refresh token is `family.secret`: the family is the login's, the secret is new at
    each use (RFC 9700). A known family with another secret is thus a token that was
    spent before: a thief's or a victim's. Access tokens have the family as `sid`, which
    means nothing to another database.
    """

    __tablename__ = "logins"

    user_id: int = reference("users.id")
    family_hash: str = Field(max_length=64, unique=True, repr=False)  # SHA-256, hex
    secret_hash: str = Field(max_length=64, repr=False)
    expires_at: datetime = Field(index=True)


class LoginAttempt(Record, table=True):
    """A wrong guess at a password, kept while it counts."""

    __tablename__ = "login_attempts"
    __table_args__ = (Index(None, "pair_hash", "created_at"), Index(None, "created_at"))

    pair_hash: str = Field(max_length=64)  # of what guesses are counted by


class PasswordGrant(SQLModel):
    """The form that logs in (RFC 6749, section 4.3.2)."""

    grant_type: Literal["password"]
    username: Credential = pydantic.Field(examples=["user@example.com"])
    password: Credential = pydantic.Field(examples=["correct horse"])


class RefreshGrant(SQLModel):
    """The form that renews a login (RFC 6749, section 6)."""

    grant_type: Literal["refresh_token"]
    refresh_token: NonEmpty = pydantic.Field(examples=["mdfW.2fwu"])


class Token(Answer):
    """The answer of the token endpoint (RFC 6749, section 5.1)."""

    access_token: str
    token_type: str = "bearer"  # noqa: S105 - no secret, a name of RFC 6750
    expires_in: int  # seconds
    refresh_token: str


class AccessToken(SQLModel):
    """What a verified access token says: which user, by which login."""

    sub: Id
    sid: Annotated[str, pydantic.AfterValidator(digest)]  # as `family_hash` stores it


# --- What all routes share


class Page(SQLModel):
    """Which rows of a list to return, and in which order."""

    skip: int = Field(default=0, ge=0, le=MAX_ID, description="Rows to leave out")
    limit: int = Field(default=100, ge=1, le=100, description="Rows to return at most")
    after: int | None = Field(
        default=None, ge=0, le=MAX_ID, description="Start behind the row with this id"
    )
    sort: str = pydantic.Field("id", pattern="^-?id$", description="-id: newest first")


class Problem(SQLModel):
    """An error: what was wrong and what to do."""

    detail: str


class OAuth2Problem(Problem):
    """An error of the token and revocation endpoints (RFC 6749, section 5.2)."""

    error: str
    error_description: str
