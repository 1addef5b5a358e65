// A request's copies: from its own text, from answers of its group, and from the answer that its caller predicts.
// `tests/lookup/searched.py` says in Python what is found.
//
// A `Text` has, for each token, the place before it with the same hash of its last token (`one_before`) or its last two
// (`two_before`), and the tables of the newest places (`..._heads`), `mask` + 1 entries each. Source: hash chains, as in
// LZ77.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "drafts.h"

constexpr int64_t FIRST_HEADS = 256, BEGINNING = 6;  // the latter: a match's length at a prediction's beginning
constexpr int CANDIDATES = 8, STEPS = 32, MATCH = 32, KINDS = 4, GAP = -1;
constexpr int NEAR = 64;    // places ahead of where an answer left its prediction that are all compared
constexpr int SETTLED = 3;  // tokens that an answer follows at a new place before the search begins there
constexpr int BUCKETS[] = {1, 2, 3, 4, 6, 9, 14, 22};
constexpr double TAKEN_MEMORY = 64.0;
enum Agreement { ALONE, UNANIMOUS, LEADING, CONTESTED };

using Tokens = std::vector<int32_t>;

inline int64_t of_two(int64_t before, int64_t token, int64_t mask) {
    return ((before * 0x9E3779B1LL >> 12) ^ token) & mask;
}
inline int kind_of_match(int64_t length, int agreement) {
    return int(std::upper_bound(std::begin(BUCKETS), std::end(BUCKETS), length) - BUCKETS - 1) * KINDS + agreement;
}

struct Text {
    Tokens tokens, one_before, two_before, one_heads, two_heads;
    int64_t size = 0, mask = -1;

    // Takes constant time for a token, averaged over the doublings of the tables.
    void extend(const int32_t* more, int64_t count) {
        tokens.insert(tokens.end(), more, more + count);
        int64_t start = size;
        size += count;
        if (size > mask + 1) {
            mask = std::max<int64_t>(mask, FIRST_HEADS - 1);
            while (size > mask + 1) mask = 2 * mask + 1;
            for (auto* each : {&one_before, &two_before, &one_heads, &two_heads}) each->assign(size_t(mask) + 1, -1);
            start = 0;
        }
        int64_t before = start ? tokens[start - 1] : GAP;
        for (int64_t place = start; place < size; ++place) {
            const int64_t token = tokens[place];
            int32_t& one = one_heads[token & mask];
            int32_t& two = two_heads[of_two(before, token, mask)];
            one_before[place] = one;
            two_before[place] = two;
            one = two = int32_t(place);
            before = token;
        }
    }
};

struct Prediction;

// A text to copy from, in the caller's memory but for `prediction`, whose place it then is.
// habit: [2], copies from it that began right, and those that were expected to; null: unknown.
struct Source {
    const Text* text = nullptr;
    Rates judge;
    double* habit = nullptr;
    int64_t name = CONTEXT;
    const Prediction* prediction = nullptr;
};

struct Place {
    int64_t length, at;
    const Source* from;
};

inline int64_t match(const Text& text, int64_t at, const Tokens& end) {
    if (at > text.size) return 0;
    const int64_t most = std::min<int64_t>(at, int64_t(end.size()));
    int64_t length = 0;
    while (length < most && text.tokens[at - 1 - length] == end[end.size() - 1 - length]) ++length;
    return length;
}

// The newest places where the last two or more tokens of `end` occur, else those of its last one. itself: whether `end`
// is the text's own, whose last place is none.
inline void earlier(const Text& text, const Source* from, const Tokens& end, bool itself, std::vector<Place>& places) {
    if (end.empty() || !text.size) return;
    const int32_t last = end.back(), before = end.size() > 1 ? end[end.size() - 2] : GAP;
    const size_t first = places.size();
    int64_t two = end.size() > 1 ? text.two_heads[of_two(before, last, text.mask)] : -1;
    int64_t one = text.one_heads[last & text.mask];
    if (itself) two = text.two_before[text.size - 1], one = text.one_before[text.size - 1];
    for (int step = 0; step < STEPS && two >= 1 && places.size() - first < CANDIDATES; ++step) {
        // Occurrences may overlap the text's end: a repeated unit continues itself.
        if (text.tokens[two] == last && text.tokens[two - 1] == before)
            places.push_back({match(text, two + 1, end), two + 1, from});
        two = text.two_before[two];
    }
    if (places.size() > first) return;
    for (int step = 0; step < STEPS && one >= 0 && places.size() - first < CANDIDATES; ++step) {
        if (text.tokens[one] == last) places.push_back({1, one + 1, from});
        one = text.one_before[one];
    }
}

inline Tokens ending(const Tokens& tokens, const int32_t* more, int64_t count) {
    const int64_t size = int64_t(tokens.size()), kept = std::max<int64_t>(0, std::min<int64_t>(size, MATCH - count));
    Tokens end(tokens.end() - kept, tokens.end());
    end.insert(end.end(), more + std::max<int64_t>(0, count - MATCH), more + count);
    return end;
}

// A predicted answer, and where the answer goes on in it. end: the answer's last tokens. appeared: of each token, whether
// the answer had it where it was expected. left: the place after which the search begins. prompt: tokens that come
// before the answer's.
struct Prediction {
    Text text;
    std::vector<uint8_t> appeared;
    Tokens end;
    int64_t prompt, length = BEGINNING, at = 0, left = 0, accepted = 0, answer = 0;

    bool is_followed() const { return 2 * (accepted + BEGINNING) >= answer; }

    // Of its places: a longer match first, then one ahead of where the answer left, then a near one.
    Place nearest(const Tokens& end) const {
        std::vector<Place> places;
        for (int64_t place = left; place < std::min(left + NEAR, text.size); ++place)
            if (text.tokens[place] == end.back()) places.push_back({match(text, place + 1, end), place + 1, nullptr});
        earlier(text, nullptr, end, false, places);
        Place best{0, left, nullptr};
        const auto better = [&](const Place& one, const Place& other) {
            if (one.length != other.length) return one.length > other.length;
            const bool ahead = one.at > left, behind = other.at > left;
            if (ahead != behind) return ahead;
            return std::abs(one.at - left) < std::abs(other.at - left);
        };
        for (const Place& each : places)
            if (best.length == 0 || better(each, best)) best = each;
        return best;
    }
    // Takes bounded work for each token.
    void follow(const int32_t* tokens, int64_t count) {
        const int64_t before = std::min(prompt, count);
        prompt -= before;
        answer += count - before;
        for (int64_t i = before; i < count; ++i) {
            end = ending(end, tokens + i, 1);
            if (length && at < text.size && text.tokens[at] == tokens[i]) {
                accepted += !appeared[at];
                appeared[at] = 1;
                if (length >= SETTLED) left = at + 1;
                length = std::min<int64_t>(length + 1, MATCH);
                ++at;
            } else {
                const Place place = nearest(end);
                length = place.length, at = place.at;
            }
        }
    }
    // Where the answer goes on in it behind `drafts`, if these are right.
    Place behind(const Source* from, const int32_t* drafts, int64_t drafted) const {
        if (!drafted) return {length, at, from};
        const bool agrees = length && at + drafted <= text.size &&
                            std::equal(drafts, drafts + drafted, text.tokens.data() + at);
        if (agrees) return {std::min<int64_t>(length + drafted, MATCH), at + drafted, from};
        const Place place = nearest(ending(end, drafts, drafted));
        return {place.length, place.at, from};
    }
};

// A request's copies, and what they were the last time. answer: the text that its group copies from it, after `prompt`
// tokens; null: it is in none. looks: rounds in which its group was searched; taken: [2], the group's decayed sum and
// weight of right tokens in these.
struct Copies {
    Text text;
    Source own, predicted;
    Prediction* prediction = nullptr;
    std::vector<Source> others;
    Text* answer = nullptr;
    int64_t prompt = 0, *looks = nullptr;
    double* taken = nullptr;
    Tokens stops, copy, agreements;
    int64_t least = 1, matched = 0, at = -1;
    Source from;  // of the last copy, which goes on at `at`
    bool searched_others = false;
    std::vector<const Source*> sources;
    std::vector<Place> places;

    bool stop(int32_t token) const { return std::find(stops.begin(), stops.end(), token) != stops.end(); }

    // Learns which tokens of the last copy were right, and appends committed tokens.
    void commit(const int32_t* tokens, int64_t count) {
        const int64_t right = teach(tokens, count);
        if (searched_others && taken) {
            const double keep = 1.0 - 1.0 / TAKEN_MEMORY;
            ++*looks;
            searched_others = false;
            taken[0] = taken[0] * keep + double(from.name == GROUP ? right : 0), taken[1] = taken[1] * keep + 1.0;
        }
        if (answer) {
            const int64_t known = std::min(std::max<int64_t>(prompt + answer->size - text.size, 0), count);
            answer->extend(tokens + known, count - known);
        }
        if (prediction) prediction->follow(tokens, count);
        if (at >= 0) at += count;
        text.extend(tokens, count);
    }
    int64_t teach(const int32_t* tokens, int64_t count) {
        const int64_t known = std::min<int64_t>(int64_t(copy.size()), count);
        int64_t right = 0;
        for (bool was = true; was && right < known; right += was) {
            const int kind = kind_of_match(matched + right, agreements[right]);
            was = copy[right] == tokens[right];
            if (!right && from.habit) from.habit[0] += was, from.habit[1] += from.judge.of(kind);
            from.judge.observe(kind, was);
        }
        copy.clear();
        return right;
    }

    // The token `offset` behind a place, -1: none. Behind the end of the own text come the drafts, then the copy itself.
    int32_t ahead(const Place& place, int64_t offset, const Drafts& drafts) const {
        const Text& there = *place.from->text;
        const bool itself = place.from == &own;
        if (itself) {
            const int64_t period = there.size + drafts.count - place.at;
            if (period <= 0) return GAP;
            offset %= period;
        }
        const int64_t next = place.at + offset;
        if (next < there.size) return there.tokens[next];
        return itself ? drafts.tokens[next - there.size] : GAP;
    }
    // All places that match the text and `drafts`, those of the preferred sources first.
    void find(const Drafts& drafts) {
        sources.clear(), places.clear();
        sources.push_back(&own);
        for (const Source& each : others) sources.push_back(&each);
        if (prediction) sources.insert(prediction->is_followed() ? sources.begin() : sources.end(), &predicted);
        const Tokens end = ending(text.tokens, drafts.tokens, drafts.count);
        for (const Source* source : sources) {
            if (source->prediction) {
                places.push_back(prediction->behind(source, drafts.tokens, drafts.count));
                continue;
            }
            const size_t first = places.size();
            const int64_t next = at + drafts.count;
            // The place copied from has moved on, and may no longer be among a chain's newest ones.
            if (at >= 0 && source->text == from.text) places.push_back({match(*source->text, next, end), next, source});
            const size_t newest = places.size();
            earlier(*source->text, source, end, source == &own && !drafts.count, places);
            const auto same = [&](const Place& each) { return newest > first && each.at == next; };
            places.erase(std::remove_if(places.begin() + int64_t(newest), places.end(), same), places.end());
        }
        const auto silent = [&](const Place& each) { return each.length < least || ahead(each, 0, drafts) < 0; };
        places.erase(std::remove_if(places.begin(), places.end(), silent), places.end());
    }

    // Appends to `drafts` the copy behind them: up to `most` tokens, the first and the first `paid` in any case, each of
    // the others with a chance of at least `worth` if those that are paid are accepted. It ends with the first of
    // `stops`. The longest match is copied from, of equals the first. Returns its place; without a source there is none.
    // degrees: how the matching places agree on each of its tokens.
    Place add_copy(Drafts& drafts, int64_t most, double worth, int64_t paid, Tokens& degrees) {
        degrees.clear();
        most = std::min(most, drafts.room - drafts.count);
        if (most <= 0 || !text.size || std::any_of(drafts.tokens, drafts.tokens + drafts.count, [&](int32_t each) {
                return stop(each);
            })) return {0, -1, nullptr};
        find(drafts);
        if (places.empty()) return {0, -1, nullptr};
        const auto shorter = [](const Place& one, const Place& other) { return one.length < other.length; };
        const Place best = *std::max_element(places.begin(), places.end(), shorter);  // the first of equals
        const double factor = best.from->habit ? best.from->habit[0] / best.from->habit[1] : 1.0;
        double alive = drafts.chance();
        const Drafts before = drafts;
        for (int64_t depth = 0; depth < most; ++depth) {
            const int32_t token = ahead(best, depth, before);
            if (token < 0) break;
            const int agreement = agreed(token, depth, before);
            const double chance = best.from->judge.of(kind_of_match(best.length + depth, agreement));
            alive *= std::min(depth ? chance : chance * factor, SURE);
            if (depth && depth >= paid && !(alive >= worth)) break;
            if (depth == paid - 1) worth *= alive;
            drafts.add(token, alive, uint8_t(best.from->name));
            degrees.push_back(agreement);
            if (stop(token)) break;
        }
        return best;
    }
    // How the places that agreed so far judge a token; they are those that agreed from now on. Those that end here say
    // nothing.
    int agreed(int32_t token, int64_t depth, const Drafts& before) {
        int64_t longest = 0, against = 0;
        size_t following = 0;
        for (const Place& each : places) {
            const int32_t other = ahead(each, depth, before);
            if (other == token) longest = std::max(longest, each.length), places[following++] = each;
            else if (other >= 0) against = std::max(against, each.length);
        }
        places.resize(following);
        return against ? (against < longest ? LEADING : CONTESTED) : following == 1 ? ALONE : UNANIMOUS;
    }

    // The copy behind the text's end, from which it learns when the next tokens are committed.
    void look(Drafts& drafts, int64_t most, double worth, int64_t paid) {
        const Place best = add_copy(drafts, most, worth, paid, agreements);
        searched_others = std::any_of(others.begin(), others.end(), [](const Source& each) { return each.name == GROUP; });
        copy.assign(drafts.tokens, drafts.tokens + drafts.count);
        if (copy.empty()) return;
        from = *best.from, at = best.at, matched = best.length;
    }
    // Continues drafts, of which the first `paid` are in any case, by a copy whose tokens are worth `price`.
    void extend(Drafts& drafts, int64_t most, double price, int64_t paid) {
        if (!drafts.count || most <= 0) return;
        const double worth = drafts.least(price, paid);
        const int64_t count = drafts.count;
        if (paid <= count && drafts.chance() < worth) return;
        add_copy(drafts, most, worth, paid - count, degrees);
        if (paid <= count && drafts.count > count && drafts.alive[count] < worth) drafts.count = count;
    }
    Tokens degrees;
};
