#pragma once

#include <nanobind/nanobind.h>

namespace dscheck {

void bind_shuffle(nanobind::module_& module);

}  // namespace dscheck
