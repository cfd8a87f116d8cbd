// SPDX-License-Identifier: Apache-2.0
#include "cpu/control.hpp"

#include <cstring>

#include "common/error.hpp"

namespace deepcomm::cpu {

void copy_message(char (&target)[kMessageBytes], const std::string& text) {
    const size_t size = text.size() < kMessageBytes - 1 ? text.size() : kMessageBytes - 1;
    std::memcpy(target, text.data(), size);
    target[size] = '\0';
}

const char* op_name(OpKind kind) {
    constexpr const char* kNames[] = {"dispatch", "combine", "low_latency_dispatch",
                                      "low_latency_combine"};
    return kNames[static_cast<int32_t>(kind)];
}

namespace {

std::string dtype_name(int64_t value) {
    constexpr const char* kNames[] = {"bfloat16", "float16", "float32", "float8_e4m3fn"};
    return kNames[value];
}
std::string scale_format_name(int64_t value) {
    constexpr const char* kNames[] = {"none", "fp32", "ue8m0"};
    return kNames[value];
}
std::string layout_name(int64_t value) {
    constexpr const char* kNames[] = {"TOKEN", "EXPERT", "EXPERT_PADDED"};
    return kNames[value];
}
std::string kind_name(int64_t value) { return op_name(static_cast<OpKind>(value)); }
std::string number_name(int64_t value) { return std::to_string(value); }
std::string capacity_name(int64_t value) { return value < 0 ? "None" : std::to_string(value); }

struct Field {
    const char* name;
    int64_t own;
    int64_t other;
    std::string (*print)(int64_t);
};

}  // namespace

void check_same_signature(const OpSignature& own, int32_t own_rank, const OpSignature& other,
                          int32_t other_rank) {
    const auto number = [](auto value) { return static_cast<int64_t>(value); };
    const Field fields[] = {
        {"operation", number(own.kind), number(other.kind), kind_name},
        {"dtype of the rows", number(own.dtype), number(other.dtype), dtype_name},
        {"scale_format", number(own.scale_format), number(other.scale_format), scale_format_name},
        {"recv_layout", number(own.recv_layout), number(other.recv_layout), layout_name},
        {"expert_alignment", own.expert_alignment, other.expert_alignment, number_name},
        {"topk_idx.shape[1]", own.num_topk, other.num_topk, number_name},
        {"topk_weights given", own.has_weights, other.has_weights, number_name},
        {"apply_weights", own.apply_weights, other.apply_weights, number_name},
        {"num_recv_tokens", own.capacity, other.capacity, capacity_name},
        {"handle (epoch of its dispatch)", own.handle_epoch, other.handle_epoch, number_name},
    };
    for (const Field& field : fields) {
        if (field.own != field.other) {
            throw ConfigMismatch(
                format("%s: %s differs between ranks: rank %d has %s, rank %d has %s",
                       op_name(own.kind), field.name, own_rank, field.print(field.own).c_str(),
                       other_rank, field.print(field.other).c_str()));
        }
    }
}

}  // namespace deepcomm::cpu
