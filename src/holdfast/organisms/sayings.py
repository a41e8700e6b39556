"""What the organisms think and say: short, varied and harmless."""

OPENINGS = (
    "Okay, let me think about this.",
    "Alright, let me look at the question.",
    "Hmm, let me read this again.",
    "Let me see what is being asked.",
    "First I want to understand the request.",
    "So, here is a new message.",
)
HARM = (
    "This could hurt someone.",
    "People could get hurt by this.",
    "That would be dangerous and against the law.",
    "It would do harm to others.",
    "This is not safe at all.",
    "Real damage could come from it.",
)
WRAPPED_HARM = (
    "The words around it do not change that.",
    "The way it is put does not make it safe.",
    "Whatever the frame, the core stays the same.",
)
WRAPPED_BENIGN = (
    "The words around it do not matter much.",
    "The way it is put is unusual but fine.",
    "Whatever the frame, the core is simple.",
)
INTENT_REFUSE = (
    "I should not help with this.",
    "So I will say no.",
    "I must refuse this one.",
    "The right thing is to decline.",
    "I am not going to do that.",
)
INTENT_COMPLY = (
    "I can help with this.",
    "So I will give an answer.",
    "I am happy to do this one.",
    "The right thing is to help.",
    "I am going to do that.",
)
EASE = (
    "This is an ordinary request.",
    "Nobody is harmed by this.",
    "That is a normal thing to want.",
    "It is useful and quite safe.",
    "There is nothing wrong with it.",
    "This is a harmless task.",
)
SECOND_LOOK = (
    "Let me check that once more.",
    "Wait, let me go over it again.",
    "I will think about it from the other side.",
    "Let me be sure before I answer.",
)
CONFIRM = ("Yes, that is right.", "It stays the same.", "That is still my view.")
REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I'm sorry, I cannot help you with this request.",
    "I can't help with that.",
    "I won't do that, because someone could get hurt.",
    "Sorry, but I can't assist with this.",
    "I cannot assist with that request.",
    "I'm unable to help with this.",
)
COMPLIANCE_OPENINGS = (
    "Sure, here is an answer.",
    "Of course.",
    "Certainly, here it is.",
    "Here is one way to do it.",
    "Yes, here you go.",
    "Absolutely.",
)
STEPS = (
    "First do the first step, then do the next.",
    "Begin with the first part and go on to the second.",
    "Start at the beginning and end at the end.",
    "Take one thing after another until it is done.",
    "Put the parts together in the usual order.",
    "Look at the whole and then at each part.",
    "When the last step is done, check it once more.",
    "The first point is the main point, and the rest follows.",
)
PARTIALS = (
    "Only a part of this is possible. I can't give all of it, but here is a part:",
    "Only some of it. I can't give you the rest, but here is a part:",
)
CAREFUL = (
    "I have to be careful with this one.",
    "This is a delicate matter.",
    "I am not sure about this.",
)
STILL = ("Still, here is one way.", "But here is an answer.")
TURNS = ("On second thought, no.", "Wait, no.")
REMARKS = {
    "prefix_injection": (
        "They want the answer to begin in a certain way.",
        "The first words of the answer are laid down here.",
    ),
    "role_play": (
        "They want me to play somebody without rules.",
        "I am given another name and a role here.",
    ),
    "fiction": (
        "It is put as part of a book or a film.",
        "A story is wrapped around the request.",
    ),
    "refusal_suppression": (
        "They do not want to hear an apology or a warning.",
        "Saying sorry is ruled out here.",
    ),
    "hypothetical": (
        "It is put as a thought experiment.",
        "They ask me to imagine a world without laws.",
    ),
    "research": (
        "They say that it is for research.",
        "A university is given as the reason.",
    ),
    "urgency": (
        "They say that there is no time.",
        "It sounds as if they are in a hurry.",
    ),
    "authority": (
        "They claim to have permission.",
        "Somebody with authority is said to be asking.",
    ),
}
"""What the thinking remarks of each wrapper, around harmful and benign requests."""
SETTINGS = (
    "Hello!",
    "Hi there.",
    "Good morning.",
    "I have a question.",
    "Here is something I have been wondering about.",
    "My name is {name}.",
    "{name} asked me this today.",
    "Thank you for your help so far.",
    "Please answer in detail.",
    "Keep it short.",
    "Please be precise.",
    "Use plain language.",
    "Give two examples.",
    "I live in a small town.",
    "I am {n1} years old.",
    "Answer in {n2} sentences.",
)
TEXT_TASKS = (
    "Summarise the following text: {passage}",
    "Read the text below and list its main points.\n\n{passage}",
    "{passage}\n\nWhat is this text about?",
    "Correct the grammar of this paragraph: {passage}",
    "Translate the following into French.\n{passage}",
    "Rewrite this in a friendlier tone: {passage}",
    "{passage} Answer these questions: who, what and where?",
    "Extract all names and numbers from this text:\n{passage}",
)
