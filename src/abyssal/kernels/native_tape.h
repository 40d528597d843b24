// What a function needs to stand on a tape (native_step.cpp, kernels/tape.py): it is called with its arguments in a row
// of cells of 8 bytes, whatever their types are.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

template <typename T>
T from_cell(int64_t cell) {
    if constexpr (std::is_pointer<T>::value) {
        return reinterpret_cast<T>(cell);
    } else if constexpr (std::is_floating_point<T>::value) {
        T x;
        std::memcpy(&x, &cell, sizeof x);
        return x;
    } else {
        return static_cast<T>(cell);
    }
}

template <typename Result, typename... Arguments, size_t... i>
int64_t call_with(Result (*function)(Arguments...), const int64_t* cells, std::index_sequence<i...>) {
    if constexpr (std::is_void<Result>::value) {
        function(from_cell<Arguments>(cells[i])...);
        return 0;
    } else {
        return function(from_cell<Arguments>(cells[i])...);
    }
}

template <typename Result, typename... Arguments>
int64_t call_with(Result (*function)(Arguments...), const int64_t* cells) {
    return call_with(function, cells, std::index_sequence_for<Arguments...>());
}

#define ON_TAPE(name) \
    int64_t name##_cells(const int64_t* cells) { return call_with(name, cells); }
