// Continues texts by their structure: an automaton over tokens, which is found while it is walked (a lazy DFA, as in
// RE2) and shared by all requests whose texts have the same structure.
//
// A node is all that the continuation of a text depends on, an edge a token. Which token a node goes on with, and where
// an edge leads, is asked of Python once (`Asked`); then it is known for every request. `tests/structure/walked.py` says
// in Python what a walk finds.
#pragma once

#include <algorithm>
#include <cctype>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "drafts.h"

constexpr int32_t NONE = -1, REFUSED = -2, LOST = -3;  // no token; the grammar forbids an edge; an edge is not known
constexpr size_t CUTS = 512;  // remembered cuts; the one written least recently goes first

// Bytes and kinds of a server's tokens. A token stays in free text if it is whole characters and not special; it is plain if it
// also stays in free text inside a JSON string.
struct Vocabulary {
    enum : uint8_t { WHOLE = 1, PLAIN = 2 };
    std::vector<int64_t> begins;
    std::string bytes;
    std::vector<uint8_t> kinds;

    int64_t size() const { return int64_t(kinds.size()); }
    const char* text(int32_t token) const { return bytes.data() + begins[token]; }
    size_t length(int32_t token) const {
        return token >= 0 && token < size() ? size_t(begins[token + 1] - begins[token]) : 0;
    }
};

// Whether bytes are whole UTF-8 characters, and whether JSON strings and Python's `isprintable` take all of them but
// blanks that few write.
inline uint8_t kind_of(const char* text, size_t length) {
    uint8_t kind = length ? Vocabulary::WHOLE | Vocabulary::PLAIN : 0;
    for (size_t at = 0; at < length;) {
        const uint8_t byte = uint8_t(text[at]);
        const size_t more = byte < 0x80 ? 0 : byte >= 0xF0 ? 3 : byte >= 0xE0 ? 2 : 1;
        if ((byte >= 0x80 && byte < 0xC2) || byte > 0xF4 || at + more >= length) return 0;
        for (size_t i = 1; i <= more; ++i)
            if ((uint8_t(text[at + i]) & 0xC0) != 0x80) return 0;
        const bool control = byte < 0x20 || byte == 0x7F || (byte == 0xC2 && uint8_t(text[at + 1]) < 0xA0);
        if (control || byte == '"' || byte == '\\') kind &= ~Vocabulary::PLAIN;
        at += more + 1;
    }
    return kind;
}

// How a target writes, learned while serving. A cut: the token last written instead of the tokenizer's, by the token before
// it and the tokenizer's.
struct Lessons {
    struct Cut {
        int32_t written;
        uint64_t when;
    };
    const Vocabulary* vocabulary;
    Rates reasons;
    std::unordered_map<uint64_t, Cut> cuts;
    uint64_t now = 0;

    double chance(uint32_t kinds) const {  // of the least likely reason
        double least = SURE;
        for (; kinds; kinds &= kinds - 1) {
            least = std::min(least, reasons.of(__builtin_ctz(kinds)));
        }
        return least;
    }
    void observe(uint32_t kinds, bool was) {
        int least = -1;
        for (uint32_t left = kinds; left; left &= left - 1) {
            const int kind = __builtin_ctz(left);
            if (least < 0 || reasons.of(kind) < reasons.of(least)) least = kind;
        }
        if (least >= 0) reasons.observe(least, was);
    }
    // All requests share cuts, so only marks and blanks are learned, never words.
    bool marks(int32_t token) const {
        const size_t length = vocabulary->length(token);
        const char* text = length ? vocabulary->text(token) : nullptr;
        return std::all_of(text, text + length, [](char each) {
            const uint8_t byte = uint8_t(each);
            return byte < 0x80 && byte != '_' && !std::isalnum(byte);
        });
    }
    void learn(uint64_t place, int32_t usual, int32_t written) {
        cuts.erase(place);
        if (written != usual) cuts[place] = {written, ++now};
        if (cuts.size() <= CUTS) return;
        const auto older = [](const auto& one, const auto& other) { return one.second.when < other.second.when; };
        cuts.erase(std::min_element(cuts.begin(), cuts.end(), older));
    }
};

inline uint64_t pair(int32_t one, int32_t two) { return uint64_t(uint32_t(one)) << 32 | uint32_t(two); }

struct Step {
    int32_t token = NONE;
    uint32_t kinds = 0;  // reasons, a bit each
};

struct Bytes {  // a set
    uint64_t bits[4] = {};
    explicit Bytes(const char* text) {
        for (; *text; ++text) bits[uint8_t(*text) >> 6] |= uint64_t(1) << (uint8_t(*text) & 63);
    }
    bool has(char each) const { return bits[uint8_t(each) >> 6] >> (uint8_t(each) & 63) & 1; }
};

// Tokens that lead to one node without an edge of their own: those that are plain, or whole; that have no byte of
// `leaving`, and none of `ending` at their end; and that begin no word.
struct Stay {
    Bytes leaving, ending;
    uint8_t kind = Vocabulary::WHOLE;
    int32_t words = NONE, to = NONE;
};

struct Node {
    enum Asked : uint8_t { NOT, KNOWN, CHOICE } asked = NOT;
    Step step;
    int32_t after = NONE, stay = NONE, options = NONE;
};

struct Walk;

enum Ask { NOBODY, DRAFTED, WRITTEN };

// Python's answers to what is not known of a walk; they call `whiflash_edge`, `whiflash_step` or `whiflash_choice`.
struct Asked {
    void (*edges)(const Walk*, int32_t node, const int32_t* tokens, int64_t count, int32_t written);
    void (*step)(const Walk*, int32_t node);
    int32_t (*uses)(const Walk*, int32_t word);
    void (*restart)(const Walk*);
};

struct Automaton {
    const Vocabulary* vocabulary;
    Lessons* lessons;
    Asked asked;
    std::vector<Node> nodes;
    std::vector<Stay> stays;
    std::vector<std::vector<std::string>> words;     // sorted
    std::vector<std::vector<int32_t>> options;       // words of a choice
    std::vector<Step> chosen;
    std::unordered_map<uint64_t, int32_t> edges, choices;
    Walk* asking = nullptr;
    int64_t most, edges_asked = 0, steps_asked = 0;

    bool is_full() const { return int64_t(nodes.size() + edges.size()) >= most; }

    bool stays_in(const Stay& stay, int32_t token) const {
        if (token < 0 || token >= vocabulary->size() || !(vocabulary->kinds[token] & stay.kind)) return false;
        const char* text = vocabulary->text(token);
        const size_t length = vocabulary->length(token);
        if (stay.ending.has(text[length - 1])) return false;
        if (std::any_of(text, text + length, [&](char each) { return stay.leaving.has(each); })) return false;
        if (stay.words == NONE) return true;
        const auto& known = words[stay.words];
        const auto word = std::lower_bound(known.begin(), known.end(), std::string(text, length));
        return word == known.end() || word->compare(0, length, text, length) != 0;
    }

    // The node after the first token of a run; LOST: nobody knows now. A written token is none that a grammar forbids,
    // though no draft may have it: special tokens are not drafted.
    int32_t follow(int32_t node, const int32_t* run, int64_t count, Ask ask) {
        for (int turn = 0; turn < 2; ++turn) {
            const Node& at = nodes[node];
            if (at.asked == Node::KNOWN && at.step.token == *run && at.after >= 0) return at.after;
            if (at.stay != NONE && stays_in(stays[at.stay], *run)) return stays[at.stay].to;
            const auto known = edges.find(pair(node, *run));
            if (known != edges.end() && (ask != WRITTEN || turn || known->second != REFUSED)) {
                if (at.asked == Node::KNOWN && at.step.token == *run) nodes[node].after = known->second;
                return known->second;
            }
            if (turn || ask == NOBODY) break;
            ++edges_asked;
            asked.edges(asking, node, run, count, ask == WRITTEN);
        }
        return LOST;
    }

    int32_t best_of(int32_t options);

    Step step(int32_t node, bool ask) {
        for (int turn = 0; turn < 2; ++turn) {
            if (nodes[node].asked == Node::KNOWN) return nodes[node].step;
            if (nodes[node].asked == Node::CHOICE) {
                const auto known = choices.find(pair(node, best_of(nodes[node].options)));
                if (known != choices.end()) return chosen[known->second];
            }
            if (turn || !ask) break;
            ++steps_asked;
            asked.step(asking, node);
        }
        return {};
    }

    // Whether the text that is known to follow a node begins with that of `written`.
    bool begins_with(int32_t node, int32_t written) {
        size_t left = vocabulary->length(written);
        if (!left) return false;
        for (const char* text = vocabulary->text(written); left && node >= 0;) {
            const Step next = step(node, false);
            const size_t same = std::min(left, vocabulary->length(next.token));
            if (!same || std::memcmp(vocabulary->text(next.token), text, same)) return false;
            text += same;
            left -= same;
            if (left) node = follow(node, &next.token, 1, NOBODY);
        }
        return !left;
    }

    // The token that a node goes on with after the token `before`, as the target cut it last.
    Step cut(int32_t node, int32_t before) {
        Step next = step(node, false);
        const auto known = next.token < 0 ? lessons->cuts.end() : lessons->cuts.find(pair(before, next.token));
        if (known != lessons->cuts.end() && begins_with(node, known->second.written))
            next.token = known->second.written;
        return next;
    }
};

// A request's place. known: tokens of its text that it was given. shared: whether others walk there, too; else it begins
// again where nothing is known. unfollowed: its last tokens, which nobody has followed yet. used: how often it has each
// word; NONE: not counted yet.
struct Walk {
    Automaton* automaton;
    int32_t node = 0, last = NONE;
    int64_t known = 0;
    uint8_t name = TOOLS;
    bool shared = true, ended = false;
    std::vector<int32_t> stops, unfollowed, used;

    // Compare what was known to follow with the token that was written, by whichever drafter.
    bool learn(int32_t token) {
        Automaton& on = *automaton;
        const Step usual = on.step(node, false), said = on.cut(node, last);
        if (said.token == NONE) return false;
        on.lessons->observe(said.kinds, said.token == token);
        if (said.token == token) return true;
        const bool marks = on.lessons->marks(usual.token) && (last < 0 || on.lessons->marks(last));
        if (marks && on.vocabulary->length(token) && on.lessons->marks(token) && on.begins_with(node, token))
            on.lessons->learn(pair(last, usual.token), usual.token, token);
        return false;
    }
    void commit(const int32_t* tokens, int64_t count, bool ask, bool learns) {
        size_t done = 0;
        learns = learns && unfollowed.empty();
        unfollowed.insert(unfollowed.end(), tokens, tokens + count);
        while (!ended && done < unfollowed.size()) {
            learns = learns && learn(unfollowed[done]);
            const int32_t after =
                automaton->follow(node, unfollowed.data() + done, int64_t(unfollowed.size() - done), ask ? WRITTEN : NOBODY);
            if (after == LOST || (after == REFUSED && !ask)) break;  // a walk that does not ask starts over, in Python
            last = unfollowed[done++];
            ended = after < 0;
            if (!ended) node = after;
        }
        unfollowed.erase(unfollowed.begin(), unfollowed.begin() + (ended ? int64_t(unfollowed.size()) : int64_t(done)));
    }

    // Advances by the text's next tokens.
    void read(const int32_t* tokens, int64_t count) {
        automaton->asking = this;
        commit(tokens, count, shared, true);
        known += count;
        const auto lost = [&] { return !unfollowed.empty() || !automaton->nodes[node].asked || automaton->is_full(); };
        if (!shared && !ended && lost()) automaton->asked.restart(this);
        ended = ended || size_t(node) >= automaton->nodes.size();  // an error ended the restart
    }

    // Cuts `drafts` to those that may follow the text, and continues them with tokens that follow, up to `room` in all, as
    // far as each has a chance that is worth the price of a row, `price`. The first `paid` are in any case, and the others
    // are judged as if those were accepted. Returns whether it changed anything.
    bool go_on(Drafts& drafts, int64_t room, double price, int64_t paid) {
        Automaton& on = *automaton;
        on.asking = this;
        int32_t at = ended || !unfollowed.empty() ? LOST : node;
        int64_t allowed = 0;
        for (; allowed < drafts.count && at >= 0; ++allowed) {
            const int32_t after = on.follow(at, drafts.tokens + allowed, drafts.count - allowed, DRAFTED);
            if (after == REFUSED) break;
            at = after;
        }
        if (at < 0) allowed = drafts.count;  // nobody knows more of them
        const bool shorter = allowed < drafts.count;
        drafts.count = allowed;
        double chance = drafts.chance(), least = drafts.least(price, paid);
        int32_t before = allowed ? drafts.tokens[allowed - 1] : last;
        room = std::min(room, drafts.room);
        while (drafts.count < room && at >= 0) {
            const int32_t usual = on.step(at, true).token;
            const Step next = on.cut(at, before);
            if (next.token < 0) break;
            // That the text may be cut so is known of the tokenizer's cut only.
            if (next.token != usual && on.follow(at, &next.token, 1, DRAFTED) < 0) break;
            chance *= on.lessons->chance(next.kinds);
            if (drafts.count >= paid && !(chance >= least)) break;
            drafts.add(before = next.token, chance, name);
            if (drafts.count == paid) least *= chance;
            if (drafts.count < room) at = on.follow(at, &before, 1, DRAFTED);
        }
        return shorter || drafts.count > allowed;
    }
};

// Twice the place of the word that the request has used most, the first of equals; 1 more if it is the only one.
inline int32_t Automaton::best_of(int32_t number) {
    std::vector<int32_t>& used = asking->used;
    int32_t best = 0, most = -1, others = 0;
    for (size_t i = 0; i < options[number].size(); ++i) {
        const int32_t word = options[number][i];
        if (used.size() <= size_t(word)) used.resize(size_t(word) + 64, NONE);
        if (used[word] == NONE) used[word] = asked.uses(asking, word);
        if (used[word] > most) others = std::max(others, most), best = int32_t(i), most = used[word];
        else others = std::max(others, used[word]);
    }
    return 2 * best + (most > others);
}
