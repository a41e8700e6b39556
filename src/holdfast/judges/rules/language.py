"""Whether an answer is in the language that the rules read, which is English.

What is not is `unparsed`: a refusal in another language must not pass as help.
"""

import re
import unicodedata

from holdfast.judges.rules.reading import spelled

MIN_WORDS = 6
"""Words without one of English from which a language counts as unknown."""
MIN_RUN = 4
"""Words in a row without a stop or comma; a list of single words has fewer."""
_ENGLISH = frozenset(
    "the of and to a in is it you that he was for on are with as i his they be at one "
    "have this from or had by but not what all were we when your can said there use an "
    "each which she do how their if will up other about out many then them these so "
    "some her would make like him into time has look two more write go see no way "
    "could "
    "people my than first been call who its now find long down day did get come made "
    "may "
    "part over new take only little work know place year live me back give most very "
    "after thing our just name good say great where help through much before line "
    "right "
    "too mean old any same tell does set three want well also play small end put home "
    "read hand large add even here must big such follow act why ask went need off try "
    "us again point world near should never let both might while something those "
    "always "
    "until without against because cannot won't can't don't isn't i'm i'll it's sorry "
    "unable however please yes sure thanks answer request".split()
)
_SHARED = frozenset("a i no me in so as do an on at all but of men us die was".split())
# The commonest words of other languages in Latin script that are not English words.
_OTHER = (
    frozenset(
        # German, Dutch
        "der das ist und nicht ich sie mit ein eine einen dem den für auf zu leid kann "
        "dir "
        "ihnen nein wir aber dabei leider het ik niet een van dat je kan helpen naar "
        "maar "
        "spijt deze nee "
        # French, Spanish, Portuguese, Italian, Romanian
        "le la les des est et je ne pas vous désolé mais une pour dans que avec ce "
        "peux puis "
        "el los las lo siento pero puedo con por una es y del se para ayudarte su sí "
        "não "
        "posso com isso desculpe mas os um uma ajudar em mi dispiace ma non di il che "
        "questa "
        "questo aiutarti per una è gli nu pot să și îmi rău "
        # Swedish, Danish, Norwegian, Finnish
        "jag det inte och att är med kan hjälpa dig tyvärr nej jeg ikke og er det "
        "beklager "
        "hjelpe hjælpe ei en voi että ja on olen valitettavasti auttaa "
        # Polish, Czech, Slovak, Croatian, Hungarian
        "nie mogę w tym się przykro ale jest na to pomóc nemohu je že se s omlouvám "
        "mohu "
        "bohužel nije ne mogu žao nem sajnálom tudok egy az hogy és segíteni "
        # Turkish, Vietnamese, Indonesian, Malay, Swahili, Tagalog
        "bu bir ve için üzgünüm olamam yardımcı değil hayır xin lỗi tôi không thể bạn "
        "này "
        "maaf saya tidak dapat bisa untuk yang dan itu dengan membantu samahani siwezi "
        "hilo "
        "kwa ya na hapana paumanhin hindi ko po ang ng sa pasensya".split()
    )
    - _ENGLISH
)
# Articles and the like, which stand in names that English uses.
_IN_NAMES = frozenset(
    "la le les el los las der das de di del du o os um il gli un une ein eine het y e "
    "van den ang".split()
)
_RUN = re.compile(r"[^,;:.!?\n…|]+")
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")
_FORMULA = re.compile(r"[=+×÷<>≤≥∑∫^\\]")
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]+`", re.DOTALL)
_CODE_SIGN = re.compile(r"[{}()\[\];=<>|\\/]")


def unknown_language(answer: str) -> str | None:
    """Say why English rules cannot read an answer, from its first letter on.

    Args:
        answer: The answer, in any case, with plain apostrophes.

    Returns:
        The reason, or None for English, a number, a formula, code, and an answer of a
        few words in no language in particular, such as a name.
    """
    if _other_script(answer):
        return "most letters are not Latin, and these rules read English"
    prose = _CODE.sub(" ", spelled(answer)).replace("’", "'")
    said = [word.casefold() for word in _WORD.findall(prose)]
    english = sum(word in _ENGLISH for word in said if word not in _SHARED)
    other = sum(word in _OTHER for word in said)
    telling = sum(word in _OTHER - _IN_NAMES for word in said)
    if other > english and (other > 1 or len(said) < MIN_WORDS) and telling:
        return "its words are not English, and these rules read English"
    small = {word for word in _WORD.findall(prose) if word.islower()}
    signs = len(_CODE_SIGN.findall(prose))
    longest = max((len(_WORD.findall(run)) for run in _RUN.findall(prose)), default=0)
    if len(small) < MIN_WORDS or signs > len(small) / 4 or longest < MIN_RUN:
        return None
    if english or any(word.endswith("ing") for word in said):
        return None
    return "none of its words is a common one of English, which these rules read"


def _other_script(answer: str) -> bool:
    letters = [character for character in answer if character.isalpha()]
    foreign = [each for each in letters if not _is_latin(each)]
    # A Chinese character is a word, and a Latin letter is not.
    words = sum(unicodedata.category(letter) == "Lo" for letter in foreign)
    if 2 * (len(foreign) + 2 * words) <= len(letters) + 2 * words:
        return False
    greek = all(unicodedata.name(each, "").startswith("GREEK") for each in foreign)
    return not (greek and (_FORMULA.search(answer) or len(foreign) == 1))


def _is_latin(letter: str) -> bool:
    name = unicodedata.name(letter, "LATIN")
    return name.startswith(("LATIN", "MODIFIER LETTER", "FEMININE", "MASCULINE"))
