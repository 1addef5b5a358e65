// Drafts in the caller's memory, and how often reasons for a draft were right. `texts.cpp` says what for.
#pragma once

#include <algorithm>
#include <cstdint>

constexpr double SURE = 0.995;   // the largest chance: even a long run of right tokens ends
constexpr double DECAY = 0.995;  // factor on earlier observations of the same kind
enum Name : uint8_t { CONTEXT, GROUP, PREDICTION, GRAMMAR, TOOLS };

// Decayed observations by kind, in Python's memory: those that were right, and all.
struct Rates {
    double* right = nullptr;
    double* seen = nullptr;

    double of(int kind) const { return right[kind] / seen[kind]; }
    void observe(int kind, bool was) const {
        right[kind] = right[kind] * DECAY + was;
        seen[kind] = seen[kind] * DECAY + 1.0;
    }
};

// Up to `room` tokens that may follow a text, for each the chance that it and all before it are accepted, and where it was
// taken from.
struct Drafts {
    int32_t* tokens;
    double* alive;
    uint8_t* names;
    int64_t room, count = 0;

    double chance() const { return count ? alive[count - 1] : 1.0; }
    // The chance below which a token's row costs more than it brings, if a row must bring `price` tokens once the first
    // `paid` tokens are committed.
    double least(double price, int64_t paid) const { return paid > 0 && paid <= count ? price * alive[paid - 1] : price; }
    void add(int32_t token, double chance, uint8_t name) {
        tokens[count] = token, alive[count] = chance, names[count++] = name;
    }
};
